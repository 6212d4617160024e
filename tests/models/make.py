"""Makes the sample models in this folder, and expected.json: what ONNX Runtime answers for each of them.

    python3 -m venv /tmp/onnx
    /tmp/onnx/bin/pip install onnx==1.23.2 onnxruntime==1.31.1 skl2onnx==1.20.0 scikit-learn==1.9.1 numpy==2.4.6
    /tmp/onnx/bin/python tests/models/make.py

Every model is a folder with a model.onnx. Those that must not load (broken, unsupported, iris-zipmap) have no
entry in expected.json. Random numbers come from fixed seeds, so a second run changes nothing that matters.
"""

import json
import pathlib
import shutil

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

HERE = pathlib.Path(__file__).parent
# tract is tested up to operator set 18; the oldest IR version that has it keeps older readers happy.
OPSET = {"": 17, "ai.onnx.ml": 3}
IR_VERSION = 8

# Open Inference Protocol datatype -> ONNX element type, NumPy type, sample values.
DATATYPES = {
    "BOOL": (TensorProto.BOOL, np.bool_, [True, False, True]),
    "INT8": (TensorProto.INT8, np.int8, [-128, 0, 127]),
    "INT16": (TensorProto.INT16, np.int16, [-32768, 0, 32767]),
    "INT32": (TensorProto.INT32, np.int32, [-(2**31), 0, 2**31 - 1]),
    "INT64": (TensorProto.INT64, np.int64, [-(2**63), 0, 2**63 - 1]),
    "UINT8": (TensorProto.UINT8, np.uint8, [0, 1, 255]),
    "UINT16": (TensorProto.UINT16, np.uint16, [0, 1, 65535]),
    "UINT32": (TensorProto.UINT32, np.uint32, [0, 1, 2**32 - 1]),
    "UINT64": (TensorProto.UINT64, np.uint64, [0, 1, 2**64 - 1]),
    "FP16": (TensorProto.FLOAT16, np.float16, [0.5, -2.0, 65504.0]),
    "FP32": (TensorProto.FLOAT, np.float32, [0.1, -2.5, 3.4e38]),
    "FP64": (TensorProto.DOUBLE, np.float64, [0.1, -2.5, 1.7e308]),
    "BYTES": (TensorProto.STRING, np.object_, ["", "iris", "schöne Blume"]),
}
NAMES = {np.dtype(numpy_type): name for name, (_, numpy_type, _) in DATATYPES.items()}

expected = {}


def tensor(array):
    flat = array.reshape(-1)
    if array.dtype == np.float16:
        flat = flat.astype(np.float32)
    return {"datatype": NAMES[array.dtype], "shape": list(array.shape), "data": flat.tolist()}


def save(name, model, *cases, external=None):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    if external:
        onnx.save_model(
            model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=external, size_threshold=0
        )
    else:
        onnx.save_model(model, path)
    if not cases:
        return
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected[name] = [
        {
            "inputs": {key: tensor(value) for key, value in case.items()},
            "outputs": dict(zip(names, map(tensor, map(np.asarray, session.run(None, case))))),
        }
        for case in cases
    ]


def graph(name, nodes, inputs, outputs, initializers=(), domains=()):
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, list(initializers)),
        opset_imports=[helper.make_opsetid("", OPSET[""])] + [helper.make_opsetid(domain, 1) for domain in domains],
        producer_name="wharf-samples",
    )
    model.ir_version = IR_VERSION
    return model


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def sklearn_model(classifier, **options):
    kind = [("X", FloatTensorType([None, 4]))]
    return to_onnx(classifier, initial_types=kind, target_opset=OPSET, options=options or None)


def iris():
    x, y = load_iris(return_X_y=True)
    x = x.astype(np.float32)
    rows = x[[0, 60, 120]]
    cases = [{"X": rows[:1]}, {"X": rows}]
    first = LogisticRegression(max_iter=500).fit(x, y)
    save("iris-1", sklearn_model(first, zipmap=False), *cases)
    # The second version gives every flower another label, so that an answer says which version gave it.
    second = RandomForestClassifier(n_estimators=10, max_depth=4, random_state=7).fit(x, (y + 1) % 3)
    save("iris-2", sklearn_model(second, zipmap=False), *cases)
    # Its label passes through tract as a dimension, not as an INT64.
    network = MLPClassifier((6,), max_iter=800, random_state=7).fit(x, y)
    save("iris-mlp", sklearn_model(network, zipmap=False), *cases)
    save("iris-zipmap", sklearn_model(first))


def mlp():
    random = np.random.default_rng(7)
    sizes = [64, 512, 384, 10]
    nodes, weights, last = [], [], "x"
    for layer, (rows, columns) in enumerate(zip(sizes, sizes[1:])):
        w = (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        b = random.standard_normal(columns).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{layer}"), numpy_helper.from_array(b, f"b{layer}")]
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [f"g{layer}"]))
        last = f"g{layer}"
        if columns != sizes[-1]:
            nodes.append(helper.make_node("Relu", [last], [f"r{layer}"]))
            last = f"r{layer}"
    nodes.append(helper.make_node("Softmax", [last], ["y"], axis=1))
    model = graph(
        "mlp",
        nodes,
        [value("x", TensorProto.FLOAT, ["batch", 64])],
        [value("y", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    save("mlp", model, *({"x": random.standard_normal((n, 64)).astype(np.float32)} for n in (1, 3)))


def identities():
    for datatype, (kind, numpy_type, values) in DATATYPES.items():
        name = f"identity-{datatype.lower()}"
        model = graph(
            name,
            [helper.make_node("Identity", ["x"], ["y"])],
            [value("x", kind, [None, None])],
            [value("y", kind, [None, None])],
        )
        save(name, model, {"x": np.array([values], dtype=numpy_type)}, {"x": np.array([values] * 2, dtype=numpy_type)})


def arithmetic():
    row = ["N", 3]
    model = graph(
        "add",
        [helper.make_node("Add", ["a", "b"], ["sum"])],
        [value("a", TensorProto.FLOAT, row), value("b", TensorProto.FLOAT, row)],
        [value("sum", TensorProto.FLOAT, row)],
    )
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    save("add", model, {"a": a[:1], "b": a[1:]}, {"a": a, "b": a * 10})

    # Two inputs whose batch has no name.
    row = [None, 3]
    model = graph(
        "concat",
        [helper.make_node("Concat", ["a", "b"], ["both"], axis=1)],
        [value("a", TensorProto.FLOAT, row), value("b", TensorProto.FLOAT, row)],
        [value("both", TensorProto.FLOAT, [None, 6])],
    )
    save("concat", model, {"a": a, "b": -a})

    # Fails on an index that is out of range: only the data can tell.
    table = numpy_helper.from_array(np.array([10, 20, 30], dtype=np.int64), "table")
    model = graph(
        "pick",
        [helper.make_node("Gather", ["table", "index"], ["picked"])],
        [value("index", TensorProto.INT64, ["N"])],
        [value("picked", TensorProto.INT64, ["N"])],
        [table],
    )
    save("pick", model, {"index": np.array([2, 0], dtype=np.int64)})

    # Weights in a file of their own.
    bias = numpy_helper.from_array(np.array([100, 200, 300], dtype=np.float32), "bias")
    model = graph(
        "external",
        [helper.make_node("Add", ["a", "bias"], ["sum"])],
        [value("a", TensorProto.FLOAT, ["N", 3])],
        [value("sum", TensorProto.FLOAT, ["N", 3])],
        [bias],
    )
    save("external", model, {"a": a}, external="weights.bin")


def unloadable():
    model = graph(
        "unsupported",
        [helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")],
        [value("x", TensorProto.FLOAT, ["N", 3])],
        [value("y", TensorProto.FLOAT, ["N", 3])],
        domains=["com.example"],
    )
    save("unsupported", model)
    broken = HERE / "broken" / "model.onnx"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("<html><body>404: this is a page, not an ONNX model.</body></html>\n")


iris()
mlp()
identities()
arithmetic()
unloadable()
lines = [f"{json.dumps(name)}: {json.dumps(cases, sort_keys=True)}" for name, cases in sorted(expected.items())]
(HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
