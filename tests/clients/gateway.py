"""The gateway, driven by tritonclient as it comes: HTTP and gRPC, binary and JSON tensors.

    gateway.py API GATEWAY MODELS

API is the scheduler's address, GATEWAY the gateway's; MODELS the folder of test models.
"""

import queue
import sys
import urllib.error
import urllib.request

import grpc
import numpy as np
import scheduler_pb2 as pb
import scheduler_pb2_grpc
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from check import SOON, check, equal, run, until

FLOWER = np.array([[5.1, 3.5, 1.4, 0.2]], dtype=np.float32)
FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [5.0, 2.0, 3.5, 1.0], [6.9, 3.2, 5.7, 2.3]], dtype=np.float32)
AVAILABLE = pb.ModelStatus.ModelState.ModelAvailable


class Clients:
    def __init__(self, api, gateway, models):
        self.address = gateway
        self.http = triton_http.InferenceServerClient(gateway, concurrency=4, network_timeout=SOON)
        self.grpc = triton_grpc.InferenceServerClient(gateway)
        self.scheduler = scheduler_pb2_grpc.SchedulerStub(grpc.insecure_channel(api))
        self.models = models

    def load(self, name, artifact):
        spec = pb.ModelSpec(uri=f"{self.models}/{artifact}", requirements=["onnx"], memoryBytes=1 << 20)
        model = pb.Model(meta=pb.MetaData(name=name), modelSpec=spec, deploymentSpec=pb.DeploymentSpec(replicas=1))
        self.scheduler.LoadModel(pb.LoadModelRequest(model=model), timeout=SOON)

        def loaded():
            request = pb.ModelStatusRequest(model=pb.ModelReference(name=name))
            status = next(iter(self.scheduler.ModelStatus(request, timeout=SOON)))
            return status.versions[0].state.state == AVAILABLE

        until(f"{name} is available", loaded)
        until(f"{name} is routed", lambda: self.grpc.is_model_ready(name))

    def both(self):
        return [(triton_http, self.http), (triton_grpc, self.grpc)]


def inputs(kind, name, array, datatype, **how):
    tensor = kind.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, **how)
    return [tensor]


def refused(function, *words):
    try:
        answer = function()
    except InferenceServerException as error:
        text = f"{error.status()} {error.message()}"
        for word in words:
            assert word in text, f"{word!r} is not in {text!r}"
        return text
    raise AssertionError(f"it answered {answer!r}")


@check
def the_server_is_live_and_ready(clients):
    for _, client in clients.both():
        assert client.is_server_live()
        until("the gateway is ready", client.is_server_ready)
    equal(clients.http.get_server_metadata()["name"], "wharf")
    equal(clients.grpc.get_server_metadata().name, "wharf")


@check
def models_are_ready(clients):
    for name, artifact in [("iris", "iris-1"), ("same", "identity-fp32"), ("words", "identity-bytes"), ("add", "add")]:
        clients.load(name, artifact)
    for _, client in clients.both():
        assert client.is_model_ready("iris")
        assert client.is_model_ready("iris", "1")
    assert not clients.http.is_model_ready("nope")
    refused(lambda: clients.grpc.is_model_ready("nope"), "NOT_FOUND", "nope")


@check
def models_have_metadata(clients):
    over_http, over_grpc = clients.http.get_model_metadata("iris"), clients.grpc.get_model_metadata("iris")
    equal(over_http["inputs"][0]["name"], "X")
    equal(over_http["inputs"][0]["datatype"], "FP32")
    equal([int(size) for size in over_http["inputs"][0]["shape"]], [-1, 4])
    equal(list(over_grpc.inputs[0].shape), [-1, 4])
    equal({output["name"] for output in over_http["outputs"]}, {"label", "probabilities"})
    equal({output.name for output in over_grpc.outputs}, {"label", "probabilities"})


@check
def binary_tensors_are_inferred(clients):
    for kind, client in clients.both():
        result = client.infer("iris", inputs(kind, "X", FLOWERS, "FP32"), request_id="one")
        equal(result.as_numpy("label").tolist(), [0, 1, 2], kind.__name__)
        probabilities = result.as_numpy("probabilities")
        equal(probabilities.shape, (3, 3), kind.__name__)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
        response = result.get_response()
        identity = response["id"] if isinstance(response, dict) else response.id
        model = response["model_name"] if isinstance(response, dict) else response.model_name
        equal((identity, model), ("one", "iris_1"), kind.__name__)


@check
def json_tensors_are_inferred(clients):
    outputs = [triton_http.InferRequestedOutput("label", binary_data=False)]
    result = clients.http.infer("iris", inputs(triton_http, "X", FLOWERS, "FP32", binary_data=False), outputs=outputs)
    equal(result.as_numpy("label").tolist(), [0, 1, 2])
    equal(result.get_response()["outputs"][0]["data"], [0, 1, 2], "as JSON")
    # One in, the other out.
    outputs = [triton_http.InferRequestedOutput("label", binary_data=True)]
    result = clients.http.infer("iris", inputs(triton_http, "X", FLOWERS, "FP32", binary_data=False), outputs=outputs)
    equal(result.as_numpy("label").tolist(), [0, 1, 2])
    assert "data" not in result.get_response()["outputs"][0], result.get_response()


@check
def only_requested_outputs_come(clients):
    for kind, client in clients.both():
        wanted = [kind.InferRequestedOutput("probabilities")]
        result = client.infer("iris", inputs(kind, "X", FLOWER, "FP32"), outputs=wanted)
        equal(result.as_numpy("label"), None, kind.__name__)
        equal(result.as_numpy("probabilities").shape, (1, 3), kind.__name__)
        unknown = [kind.InferRequestedOutput("nothing")]
        refused(lambda: client.infer("iris", inputs(kind, "X", FLOWER, "FP32"), outputs=unknown), "nothing")


@check
def several_inputs_and_texts(clients):
    texts = np.array([["", "iris", "schöne Blume"]], dtype=np.object_)
    a, b = np.array([[0, 1, 2]], dtype=np.float32), np.array([[3, 4, 5]], dtype=np.float32)
    for kind, client in clients.both():
        result = client.infer("words", inputs(kind, "x", texts, "BYTES"))
        equal([text.decode() for text in result.as_numpy("y")[0]], ["", "iris", "schöne Blume"], kind.__name__)
        both = inputs(kind, "b", b, "FP32") + inputs(kind, "a", a, "FP32")
        equal(client.infer("add", both).as_numpy("sum").tolist(), [[3, 5, 7]], kind.__name__)


@check
def wrong_input_names_the_tensor(clients):
    for kind, client in clients.both():
        wrong = np.zeros((1, 3), dtype=np.float32)
        refused(lambda: client.infer("iris", inputs(kind, "X", wrong, "FP32")), "X", "4")
        refused(lambda: client.infer("iris", inputs(kind, "X", wrong.astype(np.int64), "INT64")), "X", "INT64", "FP32")
        refused(lambda: client.infer("iris", inputs(kind, "Y", FLOWER, "FP32")), "Y")
        refused(lambda: client.infer("add", inputs(kind, "a", FLOWER[:, :3], "FP32")), "b")
        equal(client.infer("iris", inputs(kind, "X", FLOWER, "FP32")).as_numpy("label").tolist(), [0], "afterwards")


@check
def unknown_models_and_versions_are_refused(clients):
    text = refused(lambda: clients.http.infer("irsi", inputs(triton_http, "X", FLOWER, "FP32")), "404", "irsi", "iris")
    assert "there is no model" in text, text
    refused(lambda: clients.grpc.infer("irsi", inputs(triton_grpc, "X", FLOWER, "FP32")), "irsi", "iris")
    for kind, client in clients.both():
        refused(lambda: client.infer("iris", inputs(kind, "X", FLOWER, "FP32"), model_version="77"), "77")
        refused(lambda: client.infer("Not/A Name", inputs(kind, "X", FLOWER, "FP32")))
        refused(lambda: client.get_model_metadata("nope"), "nope")


@check
def the_header_names_the_model(clients):
    for kind, client in clients.both():
        result = client.infer("ignored", inputs(kind, "X", FLOWER, "FP32"), headers={"seldon-model": "iris"})
        equal(result.as_numpy("label").tolist(), [0], kind.__name__)
        assert client.is_model_ready("ignored", headers={"seldon-model": "iris"})


@check
def the_route_is_told_and_kept(clients):
    request = urllib.request.Request(f"http://{clients.address}/v2/models/iris/ready")
    with urllib.request.urlopen(request, timeout=SOON) as answer:
        route = answer.headers["x-seldon-route"]
    equal(route, ":iris_1:")
    for given in [route, ":iris_99:", "nonsense", ":iris_1::other_7:"]:
        request.add_header("x-seldon-route", given)
        with urllib.request.urlopen(request, timeout=SOON) as answer:
            equal((answer.status, answer.headers["x-seldon-route"]), (200, ":iris_1:"), given)


@check
def requests_in_the_background(clients):
    flying = [clients.http.async_infer("iris", inputs(triton_http, "X", FLOWERS, "FP32")) for _ in range(20)]
    for request in flying:
        equal(request.get_result(timeout=SOON).as_numpy("label").tolist(), [0, 1, 2])
    done = queue.Queue()
    for _ in range(20):
        clients.grpc.async_infer("iris", inputs(triton_grpc, "X", FLOWERS, "FP32"), callback=lambda result, error: done.put((result, error)))
    for _ in range(20):
        result, error = done.get(timeout=SOON)
        assert error is None, error
        equal(result.as_numpy("label").tolist(), [0, 1, 2])


@check
def streams_of_requests(clients):
    done = queue.Queue()
    with triton_grpc.InferenceServerClient(clients.address) as client:
        client.start_stream(callback=lambda result, error: done.put((result, error)))
        for turn in range(10):
            client.async_stream_infer("iris", inputs(triton_grpc, "X", FLOWERS, "FP32"), request_id=str(turn))
        for turn in range(10):
            result, error = done.get(timeout=SOON)
            assert error is None, error
            equal(result.get_response().id, str(turn), "in order")
            equal(result.as_numpy("label").tolist(), [0, 1, 2])
        # A wrong request of a stream is answered, and does not end it.
        client.async_stream_infer("iris", inputs(triton_grpc, "X", FLOWERS[:, :2].copy(), "FP32"))
        result, error = done.get(timeout=SOON)
        assert error is not None and "X" in str(error), (result, error)
        client.async_stream_infer("iris", inputs(triton_grpc, "X", FLOWERS, "FP32"), request_id="after")
        result, error = done.get(timeout=SOON)
        assert error is None, error
        equal(result.get_response().id, "after")
        client.stop_stream()


@check
def large_tensors(clients):
    """4 MiB, which is over the default limit of many a gRPC server."""
    large = np.arange(349_526 * 3, dtype=np.float32).reshape(349_526, 3)
    assert large.nbytes > 4 << 20
    for kind, client in clients.both():
        result = client.infer("same", inputs(kind, "x", large, "FP32"))
        assert np.array_equal(result.as_numpy("y"), large), kind.__name__


@check
def compressed_bodies(clients):
    """What a client may send and a server may refuse: in words, with a code."""
    for algorithm in ["gzip", "deflate"]:
        try:
            call = clients.http.infer("iris", inputs(triton_http, "X", FLOWER, "FP32"), request_compression_algorithm=algorithm)
            equal(call.as_numpy("label").tolist(), [0], algorithm)
        except InferenceServerException as error:
            assert "compress" in str(error) or "ncoding" in str(error), f"{algorithm}: {error}"


@check
def the_repository_is_the_schedulers_business(clients):
    refused(lambda: clients.grpc.load_model("iris"), "scheduler")
    refused(lambda: clients.http.load_model("iris"), "scheduler")
    refused(lambda: clients.grpc.get_model_repository_index(), "scheduler")


@check
def a_deleted_model_is_not_found(clients):
    clients.scheduler.UnloadModel(pb.UnloadModelRequest(model=pb.ModelReference(name="iris")), timeout=SOON)

    def gone():
        try:
            urllib.request.urlopen(f"http://{clients.address}/v2/models/iris/ready", timeout=SOON)
        except urllib.error.HTTPError as error:
            return error.code == 404
        return False

    until("it is not found", gone)
    refused(lambda: clients.http.infer("iris", inputs(triton_http, "X", FLOWER, "FP32")), "404")
    refused(lambda: clients.grpc.infer("iris", inputs(triton_grpc, "X", FLOWER, "FP32")), "NOT_FOUND", "iris")


run(Clients(sys.argv[1], sys.argv[2], sys.argv[3]))
