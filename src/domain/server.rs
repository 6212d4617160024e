//! Who may say what of a server.
//!
//! The rule of this module: a server has one owner. What another says of it is refused, and the refusal
//! names the owner. An agent that calls for a server nobody declared makes it, until an owner claims it.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    error::{Code, Refusal},
    names::ServerName,
    record::{Owner, ServerRow},
    spec::KubernetesMeta,
};

/// What an owner says of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Replicas expected.
    pub replicas: u32,
    /// Least and most replicas.
    pub bounds: (u32, u32),
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
}

impl ServerRow {
    /// A server that is known only because an agent called.
    #[must_use]
    pub const fn called(name: ServerName) -> Self {
        Self {
            name,
            owner: Owner::Agent,
            expected: None,
            bounds: (0, 0),
            kubernetes: None,
            doors: BTreeMap::new(),
            cordoned: BTreeSet::new(),
            draining: BTreeSet::new(),
        }
    }

    /// This server as `owner` wants it.
    ///
    /// # Errors
    /// When another owns it.
    pub fn claimed(&self, owner: Owner, claim: &Claim) -> Result<Self, Refusal> {
        if self.owner != owner && self.owner != Owner::Agent {
            let text = format!(
                "server {} belongs to the {}; change it there, or remove it there first",
                self.name,
                match self.owner {
                    Owner::File => "registry file",
                    Owner::Api => "scheduler API",
                    Owner::Agent => "agent",
                }
            );
            return Err(Refusal::new(Code::PermissionDenied, text));
        }
        Ok(Self {
            owner,
            expected: Some(claim.replicas),
            bounds: claim.bounds,
            kubernetes: claim.kubernetes.clone(),
            ..self.clone()
        })
    }

    /// Whether copies are to leave the replica: it is drained, or its owner does not expect it any more.
    #[must_use]
    pub fn leaves(&self, index: u32) -> bool {
        self.draining.contains(&index) || self.expected.is_some_and(|expected| index >= expected)
    }

    /// Whether nothing new may be placed on the replica.
    #[must_use]
    pub fn closed(&self, index: u32) -> bool {
        self.cordoned.contains(&index) || self.leaves(index)
    }
}
