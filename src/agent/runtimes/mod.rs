//! What an agent asks of the inference server beside it, whatever that is.

mod oip;

use std::fmt;

use futures::future::BoxFuture;

pub(crate) use oip::Oip;

use crate::domain::copy::Failure;

/// An inference server's repository.
pub(crate) trait Runtime: Send + Sync + fmt::Debug {
    /// Loads the folder `served` of the repository. Returns once the server says that it is loaded.
    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>>;

    /// Unloads it. One that the server does not know counts as unloaded. Returns once its memory is free.
    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>>;

    /// Whether it answers requests.
    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>>;

    /// What takes memory in the server: loaded, loading or unloading.
    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>>;
}

/// A model in the server's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Indexed {
    /// Its name there.
    pub(crate) name: String,
    /// Whether it answers.
    pub(crate) ready: bool,
}
