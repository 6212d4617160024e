//! The hot paths, one by one: how many instructions each takes is counted, and how long each takes is timed by Criterion.
//!
//! The rules of this module: what is done once is done when a function is made, so that it is in no figure; what is done
//! after that is the same in every run, but for the seeds of hash maps; and each function runs Wharf's own code, the way
//! that the product calls it.

mod gateway;
mod journal;
mod pipe;
pub mod placement;
mod residency;

use std::fmt;

/// Does it as many times as it is told.
pub type Work = Box<dyn FnMut(u64) -> anyhow::Result<()>>;

/// One hot path.
pub struct Function {
    /// What it is called on a command line, in every version.
    pub id: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    /// As many times tell what it costs.
    pub times: u64,
    /// The same with less around it.
    pub beside: Option<Beside>,
    make: fn() -> anyhow::Result<Work>,
}

/// A function that another one is put beside.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    /// Its [`Function::id`].
    pub id: &'static str,
    /// What it has, for people.
    pub name: &'static str,
    /// As many times its cost is allowed.
    pub at_most: Option<f64>,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Function").field(&self.id).finish()
    }
}

impl Function {
    /// Makes what it needs.
    ///
    /// # Errors
    /// When that is not possible; nothing of it depends on the machine.
    pub fn make(&self) -> anyhow::Result<Work> {
        (self.make)()
    }

    /// The one with this id.
    #[must_use]
    pub fn find(id: &str) -> Option<&'static Self> {
        ALL.iter().find(|function| function.id == id)
    }
}

const ONE_MODEL: &str = "1 model";

/// All of them; each after the one that it is beside.
pub static ALL: [Function; 12] = [
    Function {
        id: "rest-1",
        what: "a REST request within the gateway, 1 model",
        times: 5000,
        beside: None,
        make: || gateway::rest(1),
    },
    Function {
        id: "rest-100000",
        what: "a REST request within the gateway, 100000 models",
        times: 5000,
        beside: Some(Beside { id: "rest-1", name: ONE_MODEL, at_most: Some(1.05) }),
        make: || gateway::rest(100_000),
    },
    Function {
        id: "grpc-1",
        what: "a gRPC request within the gateway, 1 model",
        times: 5000,
        beside: None,
        make: || gateway::grpc(1),
    },
    Function {
        id: "grpc-100000",
        what: "a gRPC request within the gateway, 100000 models",
        times: 5000,
        beside: Some(Beside { id: "grpc-1", name: ONE_MODEL, at_most: Some(1.05) }),
        make: || gateway::grpc(100_000),
    },
    Function {
        id: "rest-wire",
        what: "a REST request from the client's bytes to the answer's",
        times: 5000,
        beside: None,
        make: pipe::rest,
    },
    Function {
        id: "grpc-wire",
        what: "a gRPC request from the client's bytes to the answer's",
        times: 5000,
        beside: None,
        make: pipe::grpc,
    },
    Function {
        id: "placement-100",
        what: "a copy placed and taken away, 100 replicas",
        times: 2000,
        beside: None,
        make: || placement::decisions(100),
    },
    Function {
        id: "placement-10000",
        what: "a copy placed and taken away, 10000 replicas",
        times: 2000,
        beside: Some(Beside { id: "placement-100", name: "100 replicas", at_most: Some(1.5) }),
        make: || placement::decisions(10_000),
    },
    Function {
        id: "journal-1",
        what: "a commit of one model's rows",
        times: 500,
        beside: None,
        make: || journal::commits(1),
    },
    Function {
        id: "journal-100",
        what: "a commit of 100 models' rows",
        times: 50,
        beside: None,
        make: || journal::commits(100),
    },
    Function {
        id: "residency-10",
        what: "who leaves the memory, 10 copies",
        times: 2000,
        beside: None,
        make: || residency::decisions(10),
    },
    Function {
        id: "residency-100",
        what: "who leaves the memory, 100 copies",
        times: 2000,
        beside: Some(Beside { id: "residency-10", name: "10 copies", at_most: None }),
        make: || residency::decisions(100),
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_is_named_once_and_comes_after_the_one_that_it_is_beside() {
        let mut known = BTreeSet::new();
        for function in &ALL {
            if let Some(beside) = function.beside {
                assert!(known.contains(beside.id), "{function:?} is beside {}", beside.id);
            }
            assert!(known.insert(function.id), "{function:?} is there twice");
        }
    }

    #[test]
    fn each_does_what_it_is_told() {
        for function in ALL.iter().filter(|function| !function.id.ends_with("0000")) {
            let mut work = function.make().unwrap_or_else(|error| panic!("{function:?}: {error:#}"));
            for times in [1, 3] {
                work(times).unwrap_or_else(|error| panic!("{function:?}: {error:#}"));
            }
        }
    }
}
