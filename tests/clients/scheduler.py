"""The scheduler API, driven by grpcio and code generated from proto/.

    scheduler.py API MODELS

API is the scheduler's address; MODELS the folder of test models. The server "onnx" has two replicas of 1 GiB.
"""

import queue
import sys
import threading
import time

import grpc
import health_pb2
import health_pb2_grpc
import scheduler_pb2 as pb
import scheduler_pb2_grpc
from grpc_health.v1 import health_pb2 as standard_health
from grpc_health.v1 import health_pb2_grpc as standard_health_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from check import SOON, check, equal, run, until

ME = "a-foreign-client"
State = pb.ModelStatus.ModelState
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


class Client:
    def __init__(self, api, models):
        self.channel = grpc.insecure_channel(api)
        self.stub = scheduler_pb2_grpc.SchedulerStub(self.channel)
        self.models = models

    def call(self, rpc, request):
        return getattr(self.stub, rpc)(request, timeout=SOON)

    def all(self, rpc, request):
        return list(self.call(rpc, request))

    def refused(self, rpc, request, code, *words):
        """The call fails with this code and says each of these words."""
        try:
            answer = self.call(rpc, request)
            if hasattr(answer, "__next__"):
                answer = list(answer)
        except grpc.RpcError as error:
            equal(error.code(), code, f"{rpc}: {error.details()}")
            assert error.details(), f"{rpc}: the refusal says nothing"
            for word in words:
                assert word in error.details(), f"{rpc}: {word!r} is not in {error.details()!r}"
            return error
        raise AssertionError(f"{rpc} answered {answer!r}; {code} was wanted")

    def definition(self, name, artifact="iris-1", replicas=1, generation=None, memory=1 << 20, **spec):
        model = pb.Model(
            meta=pb.MetaData(name=name),
            modelSpec=pb.ModelSpec(uri=f"{self.models}/{artifact}", requirements=["onnx"], memoryBytes=memory, **spec),
            deploymentSpec=pb.DeploymentSpec(replicas=replicas, minReplicas=0, maxReplicas=0),
        )
        if generation is not None:
            model.meta.kubernetesMeta.namespace = "seldon"
            model.meta.kubernetesMeta.generation = generation
        return model

    def load(self, name, **rest):
        equal(self.call("LoadModel", pb.LoadModelRequest(model=self.definition(name, **rest))), pb.LoadModelResponse())

    def unload(self, name):
        request = pb.UnloadModelRequest(model=pb.ModelReference(name=name))
        equal(self.call("UnloadModel", request), pb.UnloadModelResponse())

    def status(self, name, all_versions=False):
        request = pb.ModelStatusRequest(subscriberName=ME, model=pb.ModelReference(name=name), allVersions=all_versions)
        answers = self.all("ModelStatus", request)
        equal(len(answers), 1, "answers about one model")
        return answers[0]

    def until_state(self, name, state, version=None):
        def reached():
            status = self.status(name)
            equal(len(status.versions), 1, "versions in a status that asks for one")
            seen = status.versions[0]
            right = seen.state.state == state and (version is None or seen.version == version)
            return status if right else None

        return until(f"{name} is {State.Name(state)}", reached)

    def subscribe(self, rpc, request):
        return Subscription(getattr(self.stub, rpc)(request))


class Subscription:
    """A stream that is read all the time; what came is kept."""

    def __init__(self, call):
        self.call_object = call
        self.came = queue.Queue()
        self.ended = None
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        try:
            for message in self.call_object:
                self.came.put(message)
            self.ended = "the stream ended"
        except grpc.RpcError as error:
            self.ended = str(error)

    def next(self, within=SOON):
        try:
            return self.came.get(timeout=within)
        except queue.Empty:
            raise AssertionError(f"nothing came within {within} s; {self.ended or 'the stream is open'}") from None

    def until(self, what, wanted):
        """Reads until `wanted` holds; gives back everything read."""
        came = []
        deadline = time.monotonic() + SOON
        while True:
            try:
                came.append(self.next(max(deadline - time.monotonic(), 0.001)))
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}; {len(came)} came, at last {came[-3:]}") from None
            if wanted(came[-1]):
                return came

    def silent(self, within=0.5):
        try:
            return self.came.get(timeout=within)
        except queue.Empty:
            return None

    def cancel(self):
        self.call_object.cancel()


@check
def the_health_service_answers(client):
    stub = health_pb2_grpc.HealthCheckServiceStub(client.channel)
    assert stub.HealthCheck(health_pb2.HealthCheckRequest(), timeout=SOON).ok
    standard = standard_health_grpc.HealthStub(client.channel)
    for service in ["", "seldon.mlops.scheduler.Scheduler"]:
        answer = standard.Check(standard_health.HealthCheckRequest(service=service), timeout=SOON)
        equal(answer.status, standard_health.HealthCheckResponse.SERVING, service)


@check
def reflection_lists_the_services(client):
    services = ProtoReflectionDescriptorDatabase(client.channel).get_services()
    for wanted in ["seldon.mlops.scheduler.Scheduler", "seldon.mlops.health.HealthCheckService", "wharf.v1.Wharf"]:
        assert wanted in services, f"{wanted} is not in {services}"
    found = ProtoReflectionDescriptorDatabase(client.channel).FindFileContainingSymbol("seldon.mlops.scheduler.Scheduler")
    assert any(service.name == "Scheduler" for service in found.service), found.name


@check
def the_scheduler_says_its_version(client):
    assert client.call("SchedulerStatus", pb.SchedulerStatusRequest(subscriberName=ME)).applicationVersion


@check
def an_empty_scheduler_lists_nothing(client):
    equal(client.all("ModelStatus", pb.ModelStatusRequest(subscriberName=ME)), [])


@check
def servers_have_status(client):
    def whole():
        servers = client.all("ServerStatus", pb.ServerStatusRequest(subscriberName=ME, name="onnx"))
        equal(len(servers), 1, "servers of that name")
        return servers[0] if servers[0].availableReplicas == 2 else None

    server = until("both replicas are available", whole)
    equal(server.serverName, "onnx")
    equal(server.expectedReplicas, 2)
    equal(server.numLoadedModelReplicas, 0)
    equal(server.type, pb.ServerStatusResponse.StatusUpdate)
    equal([resource.replicaIdx for resource in server.resources], [0, 1])
    for resource in server.resources:
        equal(resource.totalMemoryBytes, 1 << 30)
        equal(resource.overCommitPercentage, 10)
        assert resource.availableMemoryBytes >= 1 << 30, resource
    equal([one.serverName for one in client.all("ServerStatus", pb.ServerStatusRequest(subscriberName=ME))], ["onnx"])
    for name in ["nope", "", "Not A Name"]:
        client.refused("ServerStatus", pb.ServerStatusRequest(subscriberName=ME, name=name), PRECONDITION)


@check
def server_subscribers_get_a_snapshot_then_changes(client):
    subscription = client.subscribe("SubscribeServerStatus", pb.ServerSubscriptionRequest(subscriberName=ME))
    equal(subscription.next().serverName, "onnx")
    client.load("seen-by-servers", replicas=2)
    came = subscription.until("two copies are told", lambda server: server.numLoadedModelReplicas == 2)
    for server in came:
        equal((server.serverName, server.type), ("onnx", pb.ServerStatusResponse.StatusUpdate))
    client.unload("seen-by-servers")
    subscription.until("they are told to be gone", lambda server: server.numLoadedModelReplicas == 0)
    subscription.cancel()


@check
def a_model_loads_and_its_first_version_is_its_generation(client):
    client.load("iris", generation=7, replicas=2)

    def whole():
        status = client.until_state("iris", State.ModelAvailable)
        return status if status.versions[0].state.availableReplicas == 2 else None

    status = until("both copies answer", whole)
    equal(status.modelName, "iris")
    equal(status.deleted, False)
    version = status.versions[0]
    equal(version.version, 7)
    equal(version.serverName, "onnx")
    equal((version.kubernetesMeta.namespace, version.kubernetesMeta.generation), ("seldon", 7))
    equal((version.state.availableReplicas, version.state.unavailableReplicas), (2, 0))
    equal(version.state.modelGwState, State.ModelCreate)
    assert version.state.lastChangeTimestamp.seconds > 0
    equal(sorted(version.modelReplicaState), [0, 1])
    for replica in version.modelReplicaState.values():
        equal(replica.state, pb.ModelReplicaStatus.Available)
    definition = version.modelDefn
    equal(definition.meta.name, "iris")
    equal((definition.modelSpec.memoryBytes, list(definition.modelSpec.requirements)), (1 << 20, ["onnx"]))
    equal(definition.deploymentSpec.replicas, 2)


@check
def memory_and_copies_of_servers_are_counted(client):
    def counted():
        server = client.all("ServerStatus", pb.ServerStatusRequest(subscriberName=ME, name="onnx"))[0]
        return server if server.numLoadedModelReplicas == 2 else None

    server = until("two copies are counted", counted)
    equal([resource.numLoadedModels for resource in server.resources], [1, 1])


@check
def the_same_submission_changes_nothing(client):
    client.load("iris", generation=7, replicas=2)
    equal(client.until_state("iris", State.ModelAvailable).versions[0].version, 7)
    # Only what Kubernetes knows of it is another: no new version, and the generation is told.
    client.load("iris", generation=8, replicas=2)
    seen = client.until_state("iris", State.ModelAvailable).versions[0]
    equal((seen.version, seen.kubernetesMeta.generation), (7, 8))


@check
def only_the_replicas_make_no_version(client):
    client.load("iris", generation=9, replicas=1)
    until("one copy is left", lambda: client.status("iris").versions[0].state.availableReplicas == 1)
    equal(client.status("iris").versions[0].version, 7)


@check
def a_changed_spec_is_the_next_version(client):
    client.load("iris", artifact="iris-2", generation=10)
    seen = client.until_state("iris", State.ModelAvailable, version=8).versions[0]
    equal(seen.kubernetesMeta.generation, 10)
    versions = client.status("iris", all_versions=True).versions
    equal([version.version for version in versions], [7, 8], "all versions, by number")
    until(
        "the version before is terminated, and still listed",
        lambda: client.status("iris", all_versions=True).versions[0].state.state == State.ModelTerminated,
    )


@check
def parameters_and_their_order_make_a_version(client):
    parameters = [pb.ParameterSpec(name="threads", value="2")]
    client.load("iris", artifact="iris-2", generation=11, parameters=parameters)
    seen = client.until_state("iris", State.ModelAvailable, version=9).versions[0]
    equal([(one.name, one.value) for one in seen.modelDefn.modelSpec.parameters], [("threads", "2")])


@check
def a_model_with_unknown_needs_is_not_placed_and_says_why(client):
    model = client.definition("lonely")
    del model.modelSpec.requirements[:]
    model.modelSpec.requirements.append("sklearn")
    client.call("LoadModel", pb.LoadModelRequest(model=model))
    seen = client.until_state("lonely", State.ScheduleFailed).versions[0]
    assert "sklearn" in seen.state.reason, seen.state.reason
    client.load("heavy", memory=1 << 50)
    seen = client.until_state("heavy", State.ScheduleFailed).versions[0]
    assert seen.state.reason, "no reason"


@check
def a_model_that_cannot_load_fails_and_says_why(client):
    client.load("broken", artifact="broken")
    seen = client.until_state("broken", State.ModelFailed).versions[0]
    assert seen.state.reason, "no reason"
    client.load("nowhere", artifact="no-such-folder")
    seen = client.until_state("nowhere", State.ModelFailed).versions[0]
    assert "no-such-folder" in seen.state.reason, seen.state.reason


@check
def subscribers_get_a_snapshot_then_every_change(client):
    subscription = client.subscribe("SubscribeModelStatus", pb.ModelSubscriptionRequest(subscriberName=ME))
    snapshot = {subscription.next().modelName for _ in range(6)}
    equal(snapshot, {"iris", "lonely", "heavy", "broken", "nowhere", "seen-by-servers"})
    names = [f"sub-{index}" for index in range(20)]
    for name in names:
        client.load(name)
    missing = set(names)

    def last(message):
        equal(len(message.versions), 1, "versions in one message")
        if message.versions[0].state.state == State.ModelAvailable:
            missing.discard(message.modelName)
        return not missing

    came = subscription.until("each model is told to be available", last)
    for name in names:
        mine = [message.versions[0].state.state for message in came if message.modelName == name]
        equal(mine[-1], State.ModelAvailable, name)
        assert len(mine) > 1, f"{name}: only its end was told"
    # One that comes late has the same picture at once.
    late = client.subscribe("SubscribeModelStatus", pb.ModelSubscriptionRequest(subscriberName="late"))
    picture = {late.next().modelName for _ in range(26)}
    equal(picture, snapshot | set(names))
    for name in names:
        client.unload(name)
    left = set(names)

    def gone(message):
        if message.versions[0].state.state == State.ModelTerminated:
            assert message.deleted, message
            equal(message.versions[0].state.modelGwState, State.ModelTerminated)
            left.discard(message.modelName)
        return not left

    late.until("each model is told to be terminated", gone)
    subscription.cancel()
    late.cancel()


@check
def subscribers_during_changes_miss_none(client):
    """A snapshot that begins while models change still ends in the truth."""
    client.load("moving")
    client.until_state("moving", State.ModelAvailable)
    for turn in range(20):
        subscription = client.subscribe("SubscribeModelStatus", pb.ModelSubscriptionRequest(subscriberName=f"s{turn}"))
        parameters = [pb.ParameterSpec(name="turn", value=str(turn))]
        client.load("moving", parameters=parameters)
        version = client.until_state("moving", State.ModelAvailable, version=turn + 2).versions[0].version
        subscription.until(
            f"version {version} is told",
            lambda message: message.modelName == "moving"
            and message.versions[0].version == version
            and message.versions[0].state.state == State.ModelAvailable,
        )
        subscription.cancel()
    client.unload("moving")


@check
def a_server_is_notified(client):
    notify = pb.ServerNotify(
        name="from-kubernetes",
        expectedReplicas=3,
        minReplicas=1,
        maxReplicas=5,
        kubernetesMeta=pb.KubernetesMeta(namespace="seldon", generation=4),
    )
    request = pb.ServerNotifyRequest(servers=[notify], isFirstSync=True)
    equal(client.call("ServerNotify", request), pb.ServerNotifyResponse())
    equal(client.call("ServerNotify", request), pb.ServerNotifyResponse(), "the second time")
    request = pb.ServerStatusRequest(subscriberName=ME, name="from-kubernetes")
    server = until("it is listed", lambda: client.all("ServerStatus", request)[0])
    equal((server.expectedReplicas, server.availableReplicas), (3, 0))
    equal((server.kubernetesMeta.namespace, server.kubernetesMeta.generation), ("seldon", 4))
    equal(client.call("ServerNotify", pb.ServerNotifyRequest()), pb.ServerNotifyResponse(), "of no server")


@check
def a_server_of_the_registry_belongs_to_the_registry(client):
    request = pb.ServerNotifyRequest(servers=[pb.ServerNotify(name="onnx", expectedReplicas=9)])
    client.refused("ServerNotify", request, PRECONDITION, "registry")
    equal(client.all("ServerStatus", pb.ServerStatusRequest(subscriberName=ME, name="onnx"))[0].expectedReplicas, 2)


@check
def the_control_plane_is_asked_in_order(client):
    event = pb.ControlPlaneResponse
    subscription = client.subscribe("SubscribeControlPlane", pb.ControlPlaneSubscriptionRequest(subscriberName=ME))
    came = [subscription.next().event for _ in range(4)]
    equal(came, [event.SEND_SERVERS, event.SEND_EXPERIMENTS, event.SEND_MODELS, event.SEND_PIPELINES])
    equal(subscription.silent(), None, "after the markers")
    equal(subscription.ended, None, "the stream")
    subscription.cancel()


@check
def names_outside_the_rule_are_refused(client):
    for name in ["", "Iris", "iris_1", "-iris", "iris-", "a.b", "../../etc/passwd", "a/b", "ü", "a b", "a" * 300, "a\x00b"]:
        client.refused("LoadModel", pb.LoadModelRequest(model=client.definition(name)), PRECONDITION)
        reference = pb.ModelReference(name=name)
        client.refused("UnloadModel", pb.UnloadModelRequest(model=reference), PRECONDITION)
        client.refused("ModelStatus", pb.ModelStatusRequest(subscriberName=ME, model=reference), PRECONDITION)


@check
def unknown_models_are_refused(client):
    reference = pb.ModelReference(name="nope")
    client.refused("UnloadModel", pb.UnloadModelRequest(model=reference), PRECONDITION, "nope")
    client.refused(
        "ModelStatus", pb.ModelStatusRequest(subscriberName=ME, model=reference), PRECONDITION, "Failed to find model", "nope"
    )


@check
def empty_messages_are_refused_and_harm_nothing(client):
    client.refused("LoadModel", pb.LoadModelRequest(), PRECONDITION, "model")
    client.refused("LoadModel", pb.LoadModelRequest(model=pb.Model()), PRECONDITION, "meta")
    named = pb.Model(meta=pb.MetaData(name="no-spec"))
    client.refused("LoadModel", pb.LoadModelRequest(model=named), PRECONDITION, "modelSpec")
    client.refused("UnloadModel", pb.UnloadModelRequest(), PRECONDITION, "model")
    client.refused("UnloadModel", pb.UnloadModelRequest(model=pb.ModelReference()), PRECONDITION)
    client.refused("ServerNotify", pb.ServerNotifyRequest(servers=[pb.ServerNotify()]), PRECONDITION)
    assert client.status("iris").versions, "the scheduler goes on"
    client.refused(
        "ModelStatus", pb.ModelStatusRequest(subscriberName=ME, model=pb.ModelReference(name="no-spec")), PRECONDITION
    )


@check
def what_cannot_be_is_refused(client):
    def refused(*words, **changes):
        model = client.definition("refused")
        for path, value in changes.items():
            part, field = path.split("__")
            setattr(getattr(model, part), field, value)
        client.refused("LoadModel", pb.LoadModelRequest(model=model), PRECONDITION, *words)

    refused("uri", modelSpec__uri="")
    refused("uri", modelSpec__uri="/models/../../etc")
    refused("uri", modelSpec__uri="file:///models/%2e%2e/%2e%2e/etc")
    refused("replicas", deploymentSpec__replicas=1, deploymentSpec__minReplicas=2)
    refused("replicas", deploymentSpec__replicas=5, deploymentSpec__maxReplicas=4)
    refused("server", modelSpec__server="Not A Server")
    explainer = client.definition("refused", explainer=pb.ExplainerSpec(type="anchor"))
    client.refused("LoadModel", pb.LoadModelRequest(model=explainer), PRECONDITION, "explainer")


@check
def what_wharf_does_not_do_is_said(client):
    code = grpc.StatusCode.UNIMPLEMENTED
    client.refused("StartExperiment", pb.StartExperimentRequest(), code, "experiment")
    client.refused("StopExperiment", pb.StopExperimentRequest(name="x"), code, "experiment")
    client.refused("ExperimentStatus", pb.ExperimentStatusRequest(subscriberName=ME), code)
    client.refused("SubscribeExperimentStatus", pb.ExperimentSubscriptionRequest(subscriberName=ME), code)
    client.refused("LoadPipeline", pb.LoadPipelineRequest(), code, "pipeline")
    client.refused("UnloadPipeline", pb.UnloadPipelineRequest(), code, "pipeline")
    client.refused("PipelineStatus", pb.PipelineStatusRequest(), code)
    client.refused("SubscribePipelineStatus", pb.PipelineSubscriptionRequest(), code)
    client.refused("ModelStatusEvent", pb.ModelUpdateStatusMessage(), code)


@check
def a_deleted_model_stays_listed_as_terminated(client):
    request = pb.UnloadModelRequest(
        model=pb.ModelReference(name="iris"), kubernetesMeta=pb.KubernetesMeta(namespace="seldon", generation=12)
    )
    equal(client.call("UnloadModel", request), pb.UnloadModelResponse())
    status = client.until_state("iris", State.ModelTerminated)
    equal(status.deleted, True)
    equal(status.versions[0].state.modelGwState, State.ModelTerminated)
    equal(status.versions[0].kubernetesMeta.generation, 12)
    assert "iris" in {one.modelName for one in client.all("ModelStatus", pb.ModelStatusRequest(subscriberName=ME))}
    client.unload("iris")  # again: as Seldon's scheduler, this succeeds
    equal(client.until_state("iris", State.ModelTerminated).deleted, True)


@check
def a_deleted_name_can_be_used_again(client):
    client.load("iris", generation=1)
    seen = client.until_state("iris", State.ModelAvailable)
    equal(seen.deleted, False)
    equal(seen.versions[0].kubernetesMeta.generation, 1)
    # While it is being deleted, too.
    client.unload("iris")
    client.load("iris", generation=1, artifact="iris-2")
    client.until_state("iris", State.ModelAvailable)
    equal(client.status("iris").deleted, False)


@check
def failed_models_are_deleted_like_others(client):
    for name in ["lonely", "heavy", "broken", "nowhere", "iris", "moving"]:
        client.unload(name)
    for name in ["lonely", "heavy", "broken", "nowhere", "iris", "moving"]:
        status = client.until_state(name, State.ModelTerminated)
        equal(status.versions[0].state.modelGwState, State.ModelTerminated, name)

    def empty():
        server = client.all("ServerStatus", pb.ServerStatusRequest(subscriberName=ME, name="onnx"))[0]
        return server.numLoadedModelReplicas == 0

    until("nothing is left on the server", empty)


run(Client(sys.argv[1], sys.argv[2]))
