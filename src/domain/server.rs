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

/// What an operator marks replicas with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing new is placed there.
    Cordon,
    /// That, and what is there moves away.
    Drain,
    /// Neither.
    Clear,
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

    /// Whether `owner` may take the server away.
    ///
    /// # Errors
    /// When another owns it.
    pub fn released(&self, owner: Owner) -> Result<(), Refusal> {
        if self.owner == owner {
            return Ok(());
        }
        let text = format!("server {} belongs to the {}", self.name, self.owner.name());
        Err(Refusal::new(Code::PermissionDenied, text))
    }

    /// Sets an operator's mark on replicas.
    pub fn mark(&mut self, mark: Mark, replicas: &BTreeSet<u32>) {
        match mark {
            Mark::Cordon => self.cordoned.extend(replicas),
            Mark::Drain => self.draining.extend(replicas),
            Mark::Clear => {
                self.cordoned.retain(|index| !replicas.contains(index));
                self.draining.retain(|index| !replicas.contains(index));
            }
        }
    }

    /// Forgets what is kept of every replica that is not among these. Says whether there was any.
    pub fn keep_only(&mut self, known: impl Fn(u32) -> bool) -> bool {
        let kept = self.doors.len() + self.cordoned.len() + self.draining.len();
        self.doors.retain(|index, _| known(*index));
        self.cordoned.retain(|index| known(*index));
        self.draining.retain(|index| known(*index));
        kept != self.doors.len() + self.cordoned.len() + self.draining.len()
    }

    /// Every replica of which something is kept.
    pub fn kept(&self) -> impl Iterator<Item = u32> {
        self.doors.keys().chain(&self.cordoned).chain(&self.draining).copied()
    }

    /// Whether nobody but an agent ever spoke of the server: then it goes when its replicas have.
    #[must_use]
    pub fn is_only_called(&self) -> bool {
        self.owner == Owner::Agent
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
