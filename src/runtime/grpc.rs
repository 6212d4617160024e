//! The gRPC half of the protocol.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use tonic::{Request, Response, Status, Streaming};
use tract_onnx::prelude::{Datum, Tensor};

use super::{
    EXTENSIONS, SERVER, Shared, VERSION,
    datatype::Datatype,
    failure::{Failure, Kind},
    plan::{Plan, Port},
    stop::Stop,
    tensor::{self, Claim, converted, elements},
};
use crate::rpc::proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
    ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStreamInferResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse, RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    grpc_inference_service_server::GrpcInferenceService, infer_parameter::ParameterChoice,
    model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
    repository_index_response::ModelIndex,
};

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Service {
    shared: Arc<Shared>,
}

impl Service {
    pub(super) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: true }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        match self.shared.plan(&name, &version) {
            Ok(_) => Ok(Response::new(ModelReadyResponse { ready: true })),
            Err(failure) if failure.kind == Kind::Loading => Ok(Response::new(ModelReadyResponse { ready: false })),
            Err(failure) => Err(failure.into()),
        }
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: SERVER.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let plan = self.shared.plan(&name, &version)?;
        let tensors = |ports: &[Port]| {
            ports
                .iter()
                .map(|port| TensorMetadata {
                    name: port.name.clone(),
                    datatype: port.datatype.to_string(),
                    shape: port.wire_shape(),
                    parameters: HashMap::new(),
                })
                .collect()
        };
        let artifact_bytes = ParameterChoice::Uint64Param(plan.artifact_bytes);
        Ok(Response::new(ModelMetadataResponse {
            name: plan.name.clone(),
            versions: vec![VERSION.to_owned()],
            platform: plan.platform.to_owned(),
            inputs: tensors(&plan.inputs),
            outputs: tensors(&plan.outputs),
            parameters: [("artifact_bytes".to_owned(), InferParameter { parameter_choice: Some(artifact_bytes) })]
                .into(),
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        Ok(Response::new(infer(&self.shared, request.into_inner()).await?))
    }

    type ModelStreamInferStream = BoxStream<'static, Result<ModelStreamInferResponse, Status>>;

    /// Answers each message in turn. One that fails is answered with its error, and the stream goes on.
    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let shared = Arc::clone(&self.shared);
        let answers = request.into_inner().then(move |message| {
            let shared = Arc::clone(&shared);
            async move {
                let request = message?;
                let named = ModelInferResponse {
                    model_name: request.model_name.clone(),
                    model_version: request.model_version.clone(),
                    id: request.id.clone(),
                    ..ModelInferResponse::default()
                };
                let (error_message, response) = match infer(&shared, request).await {
                    Ok(response) => (String::new(), response),
                    Err(failure) => (failure.message, named),
                };
                Ok(ModelStreamInferResponse { error_message, infer_response: Some(response) })
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn repository_index(
        &self,
        request: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let models = self.shared.index(request.into_inner().ready).await?;
        let models = models.into_iter().map(|model| ModelIndex {
            name: model.name,
            version: VERSION.to_owned(),
            state: model.state.to_owned(),
            reason: model.reason,
        });
        Ok(Response::new(RepositoryIndexResponse { models: models.collect() }))
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        self.shared.load(&request.into_inner().model_name).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        self.shared.unload(&request.into_inner().model_name)?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }
}

async fn infer(shared: &Shared, request: ModelInferRequest) -> Result<ModelInferResponse, Failure> {
    let plan = shared.plan(&request.model_name, &request.model_version)?;
    let limit = shared.limits.body_bytes;
    shared.infer(plan, move |plan, stop| run(plan, request, limit, stop)).await
}

fn run(plan: &Plan, request: ModelInferRequest, limit: usize, stop: &Stop) -> Result<ModelInferResponse, Failure> {
    let raw = !request.raw_input_contents.is_empty();
    let (came, wanted) = (request.raw_input_contents.len(), request.inputs.len());
    if raw && came != wanted {
        return Err(Failure::invalid(format!(
            "raw_input_contents has {came} entries for {wanted} inputs; send one for each input, in their order"
        )));
    }
    let claims: Vec<_> = request
        .inputs
        .iter()
        .map(|input| Claim { name: &input.name, datatype: &input.datatype, shape: &input.shape })
        .collect();
    let bound = tensor::bind(plan, &claims, limit)?;
    let places = tensor::outputs(plan, request.outputs.iter().map(|output| output.name.as_str()))?;
    let mut inputs = Vec::with_capacity(bound.len());
    for (place, (input, (index, shape))) in request.inputs.into_iter().zip(bound).enumerate() {
        let port = &plan.inputs[index];
        let tensor = match (request.raw_input_contents.get(place), input.contents) {
            (Some(raw), None) => tensor::from_raw(port, &shape, raw)?,
            (Some(_), Some(_)) => {
                let name = &port.name;
                return Err(Failure::invalid(format!(
                    "input {name:?} has contents beside raw_input_contents; send all inputs one way"
                )));
            }
            (None, contents) => from_contents(port, &shape, contents.unwrap_or_default())?,
        };
        inputs.push((index, tensor));
    }
    inputs.sort_by_key(|(index, _)| *index);
    let inputs = inputs.into_iter().map(|(_, tensor)| tensor).collect();
    let results = plan.run(inputs, &places, stop)?;
    // The typed contents have no field for FP16.
    let raw = raw || places.iter().any(|place| plan.outputs[*place].datatype == Datatype::Fp16);
    let mut outputs = Vec::with_capacity(results.len());
    let mut raw_output_contents: Vec<Bytes> = Vec::new();
    for (place, result) in places.into_iter().zip(results) {
        let port = &plan.outputs[place];
        let shape = result.shape().iter().map(|length| i64::try_from(*length).unwrap_or(i64::MAX)).collect();
        let contents = if raw {
            raw_output_contents.push(tensor::into_raw(result)?);
            None
        } else {
            Some(to_contents(port, &result)?)
        };
        let (name, datatype) = (port.name.clone(), port.datatype.to_string());
        outputs.push(InferOutputTensor { name, datatype, shape, parameters: HashMap::new(), contents });
    }
    Ok(ModelInferResponse {
        model_name: plan.name.clone(),
        model_version: VERSION.to_owned(),
        id: request.id,
        parameters: HashMap::new(),
        outputs,
        raw_output_contents,
    })
}

fn from_contents(port: &Port, shape: &[usize], contents: InferTensorContents) -> Result<Tensor, Failure> {
    let c = contents;
    match port.datatype {
        Datatype::Bool => fill(port, shape, "bool_contents", c.bool_contents, Some),
        Datatype::Int8 => fill(port, shape, "int_contents", c.int_contents, |value| i8::try_from(value).ok()),
        Datatype::Int16 => fill(port, shape, "int_contents", c.int_contents, |value| i16::try_from(value).ok()),
        Datatype::Int32 => fill(port, shape, "int_contents", c.int_contents, Some),
        Datatype::Int64 => fill(port, shape, "int64_contents", c.int64_contents, Some),
        Datatype::Uint8 => fill(port, shape, "uint_contents", c.uint_contents, |value| u8::try_from(value).ok()),
        Datatype::Uint16 => fill(port, shape, "uint_contents", c.uint_contents, |value| u16::try_from(value).ok()),
        Datatype::Uint32 => fill(port, shape, "uint_contents", c.uint_contents, Some),
        Datatype::Uint64 => fill(port, shape, "uint64_contents", c.uint64_contents, Some),
        Datatype::Fp32 => fill(port, shape, "fp32_contents", c.fp32_contents, Some),
        Datatype::Fp64 => fill(port, shape, "fp64_contents", c.fp64_contents, Some),
        Datatype::Bytes => fill(port, shape, "bytes_contents", c.bytes_contents, |value| String::from_utf8(value).ok()),
        Datatype::Fp16 => Err(Failure::invalid(format!(
            "input {:?} is FP16, which the typed contents have no field for; send raw_input_contents",
            port.name
        ))),
    }
}

fn fill<S, T: Datum>(
    port: &Port,
    shape: &[usize],
    field: &str,
    values: Vec<S>,
    element: impl Fn(S) -> Option<T>,
) -> Result<Tensor, Failure> {
    let (name, datatype) = (&port.name, port.datatype);
    let (came, wanted) = (values.len(), shape.iter().product::<usize>());
    // Before allocating: the values are there already, the shape is only a claim.
    if came != wanted {
        return Err(Failure::invalid(format!(
            "input {name:?} came with {came} values in {field}, wanted {wanted} for {datatype} of shape {shape:?}"
        )));
    }
    let mut tensor = tensor::blank(datatype, shape)?;
    for (place, (to, value)) in tensor::slice::<T>(&mut tensor)?.iter_mut().zip(values).enumerate() {
        *to = element(value)
            .ok_or_else(|| Failure::invalid(format!("input {name:?} has a value at {place} that is not {datatype}")))?;
    }
    Ok(tensor)
}

fn to_contents(port: &Port, tensor: &Tensor) -> Result<InferTensorContents, Failure> {
    let mut contents = InferTensorContents::default();
    match port.datatype {
        Datatype::Bool => contents.bool_contents = converted::<bool, _>(tensor)?,
        Datatype::Int8 => contents.int_contents = converted::<i8, _>(tensor)?,
        Datatype::Int16 => contents.int_contents = converted::<i16, _>(tensor)?,
        Datatype::Int32 => contents.int_contents = converted::<i32, _>(tensor)?,
        Datatype::Int64 => contents.int64_contents = converted::<i64, _>(tensor)?,
        Datatype::Uint8 => contents.uint_contents = converted::<u8, _>(tensor)?,
        Datatype::Uint16 => contents.uint_contents = converted::<u16, _>(tensor)?,
        Datatype::Uint32 => contents.uint_contents = converted::<u32, _>(tensor)?,
        Datatype::Uint64 => contents.uint64_contents = converted::<u64, _>(tensor)?,
        Datatype::Fp32 => contents.fp32_contents = converted::<f32, _>(tensor)?,
        Datatype::Fp64 => contents.fp64_contents = converted::<f64, _>(tensor)?,
        Datatype::Bytes => {
            contents.bytes_contents = elements::<String>(tensor)?.iter().map(|text| text.as_bytes().to_vec()).collect();
        }
        Datatype::Fp16 => return Err(Failure::new(Kind::Internal, "FP16 goes only as raw contents")),
    }
    Ok(contents)
}
