"""Tells irises apart by their petals; version 2 is one class off, so that an answer shows which version gave it."""

import numpy as np
import triton_python_backend_utils as pb_utils

OFF = 1


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            length = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[:, 2]
            label = (np.digitize(length, [2.5, 4.9]) + OFF) % 3
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("label", label.astype(np.int64))]))
        return responses
