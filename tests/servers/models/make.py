"""Trains the models that MLServer serves in tests, into the folder that is the argument: with the very packages that
will load them. Those that end in 2 are one class off, so that an answer shows which model gave it. `expected.json` has a
request for each, with what the library itself answers."""

import json
import pathlib
import sys

import joblib
import numpy
import xgboost
from sklearn.datasets import load_iris
from sklearn.tree import DecisionTreeClassifier

target = pathlib.Path(sys.argv[1])
features, classes = load_iris(return_X_y=True)
FLOWER = [5.1, 3.5, 1.4, 0.2]
expected = {}


def folder(name):
    path = target / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def expect(name, model):
    answer = [int(label) for label in model.predict(numpy.array([FLOWER], dtype=numpy.float32))]
    expected[name] = [
        {
            "inputs": {"X": {"datatype": "FP32", "shape": [1, 4], "data": FLOWER}},
            "outputs": {"predict": {"datatype": "INT64", "shape": [1, 1], "data": answer}},
        }
    ]


for number in (1, 2):
    model = DecisionTreeClassifier(max_depth=3, random_state=0).fit(features, (classes + number - 1) % 3)
    joblib.dump(model, folder(f"sklearn-iris-{number}") / "iris.joblib")
    expect(f"sklearn-iris-{number}", model)

model = xgboost.XGBClassifier(n_estimators=5, max_depth=3).fit(features, (classes + 1) % 3)
model.save_model(folder("xgboost-iris-2") / "model.json")
expect("xgboost-iris-2", model)
(target / "expected.json").write_text(json.dumps(expected, indent=1))

(folder("sklearn-broken") / "model.joblib").write_bytes(b"these are not a model's bytes")

# Settings that the artifact brings, with keys that only MLServer knows.
settings = folder("sklearn-settings")
joblib.dump(DecisionTreeClassifier(max_depth=3, random_state=0).fit(features, classes), settings / "weights.joblib")
(settings / "model-settings.json").write_text(
    """{
  "platform": "scikit-learn",
  "name": "as-it-was-called-at-home",
  "implementation": "mlserver_sklearn.SKLearnModel",
  "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}],
  "outputs": [{"name": "predict", "datatype": "INT64", "shape": [-1, 1]}],
  "parameters": {"uri": "/home/somebody/models/weights.joblib"}
}
"""
)
