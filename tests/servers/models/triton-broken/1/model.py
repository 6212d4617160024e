"""Can't be loaded."""


class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("these weights are broken")
