//! Calls to rclone's remote control.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::domain::secret::Secret;

/// Longest wait for an answer. What takes long is asked for as a job; looking into a store may take its time.
const ANSWER: Duration = Duration::from_secs(120);
/// The largest answer.
const LARGEST: usize = 64 << 20;

/// Where a running rclone listens.
#[derive(Clone, Debug)]
pub(super) enum Address {
    /// A socket in a folder that is the agent's alone.
    Socket(PathBuf),
    /// A port of this machine, behind a password.
    Port(u16, Secret),
}

/// Why a call brought no answer.
#[derive(Debug)]
pub(super) enum CallError {
    /// rclone can't be spoken to.
    Gone(String),
    /// It says that it could not.
    Failed(String),
}

/// The user in front of the password.
pub(super) const USER: &str = "wharf";

impl Address {
    /// Does `method` with `input`. Neither is ever logged: there are credentials in it.
    pub(super) async fn call(&self, method: &str, input: &Value) -> Result<Value, CallError> {
        let called = async {
            match self {
                Self::Socket(path) => ask(UnixStream::connect(path).await, None, method, input).await,
                Self::Port(port, password) => {
                    ask(TcpStream::connect(("127.0.0.1", *port)).await, Some(password), method, input).await
                }
            }
        };
        match tokio::time::timeout(ANSWER, called).await {
            Ok(answer) => answer,
            Err(_) => Err(CallError::Gone(format!("rclone gave no answer within {} s", ANSWER.as_secs()))),
        }
    }
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: std::io::Result<S>,
    password: Option<&Secret>,
    method: &str,
    input: &Value,
) -> Result<Value, CallError> {
    let gone = |error: &dyn std::fmt::Display| CallError::Gone(format!("rclone can't be reached: {error}"));
    let stream = TokioIo::new(stream.map_err(|error| gone(&error))?);
    let (mut send, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(|error| gone(&error))?;
    let mut request = http::Request::post(format!("/{method}"))
        .header(http::header::HOST, "localhost")
        .header(http::header::CONTENT_TYPE, "application/json");
    if let Some(password) = password {
        let mut value = http::HeaderValue::from_str(password.expose()).map_err(|error| gone(&error))?;
        value.set_sensitive(true);
        request = request.header(http::header::AUTHORIZATION, value);
    }
    let request = request.body(Full::new(Bytes::from(input.to_string()))).map_err(|error| gone(&error))?;
    let answer = async {
        let response = send.send_request(request).await.map_err(|error| gone(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST).collect().await.map_err(|error| gone(&error))?;
        let value: Value = serde_json::from_slice(&body.to_bytes())
            .map_err(|error| CallError::Gone(format!("rclone's answer is not understood: {error}")))?;
        if status.is_success() {
            return Ok(value);
        }
        // Only this of it: the answer repeats what was asked, credentials and all.
        Err(CallError::Failed(value["error"].as_str().unwrap_or("it does not say why").to_owned()))
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // The connection ends once the answer is there.
        _ = connection => answer.await,
    }
}
