//! Labels of metrics: closed sets, so that no client and no error text can make a series.

use prometheus_client::encoding::{
    EncodeLabelKey, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder,
};

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// Every value that there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                let text = match self {
                    $(Self::$variant => $text,)+
                };
                EncodeLabelValue::encode(&text, encoder)
            }
        }
    };
}

label! {
    /// How a submission ended.
    Submission {
        /// It was made durable.
        Accepted = "accepted",
        /// It changed nothing.
        Refused = "refused",
    }
}

label! {
    /// How a commit of the journal ended.
    Commit {
        /// It is durable.
        Committed = "committed",
        /// It is known not to have happened.
        Failed = "failed",
        /// Nobody knows, and the process exits.
        Unknown = "unknown",
    }
}

label! {
    /// How a placement decision ended.
    Placement {
        /// A replica was chosen.
        Placed = "placed",
        /// None was found.
        Unplaced = "unplaced",
    }
}

label! {
    /// What happened to an actor.
    ActorEvent {
        /// It started.
        Started = "started",
        /// It stopped as it was asked to.
        Stopped = "stopped",
        /// Its handler panicked.
        Panicked = "panicked",
        /// It was built anew.
        Restarted = "restarted",
        /// It was restarted too often, and the process stops.
        Escalated = "escalated",
        /// It refused a message because too many waited.
        Refused = "refused",
    }
}

label! {
    /// The protocol of a request.
    Protocol {
        /// REST.
        Rest = "rest",
        /// gRPC.
        Grpc = "grpc",
    }
}

/// A state's or an actor's name as it stands in the code: what is written there is a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Name(pub &'static str);

impl EncodeLabelValue for Name {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

/// An HTTP status or a gRPC status, as a number. Numbers that no protocol has count as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Code(u16);

impl Code {
    /// The label of a status number: 0 to 16 are gRPC's, 100 to 599 are HTTP's.
    #[must_use]
    pub const fn new(status: u16) -> Self {
        match status {
            0..=16 | 100..=599 => Self(status),
            _ => Self(u16::MAX),
        }
    }
}

impl EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        if self.0 == u16::MAX { EncodeLabelValue::encode(&"other", encoder) } else { self.0.encode(encoder) }
    }
}

/// `outcome` of type `T`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ByOutcome<T> {
    pub(super) outcome: T,
}

impl<T: EncodeLabelValue> EncodeLabelSet for ByOutcome<T> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut label = encoder.encode_label();
        let mut key = label.encode_label_key()?;
        EncodeLabelKey::encode(&"outcome", &mut key)?;
        let mut value = key.encode_label_value()?;
        self.outcome.encode(&mut value)?;
        value.finish()
    }
}

/// `actor`, `event`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByActor {
    pub(super) actor: Name,
    pub(super) event: ActorEvent,
}

/// `protocol`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByProtocol {
    pub(super) protocol: Protocol,
}

/// Seldon's labels of everything that an agent counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByReplica {
    pub(super) server: String,
    pub(super) server_replica: u32,
}

/// Seldon's labels of a request's duration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByMethod {
    pub(super) server: String,
    pub(super) server_replica: u32,
    pub(super) method: Protocol,
    pub(super) code: Code,
}

/// Seldon's labels of a model's requests.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByModel {
    pub(super) server: String,
    pub(super) server_replica: u32,
    pub(super) model: String,
    pub(super) model_internal: String,
    pub(super) method_type: Protocol,
    pub(super) code: Code,
}
