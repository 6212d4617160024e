//! The agent session's messages: wire to domain and back, for both of its ends.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::{
        copy::{Failure, FailureClass, Progress, Report, Residency},
        error::{Code, Refusal},
        memory::{Bytes, Resources},
        names::ModelName,
        order::Order,
        size::{Size, SizeKey, Trust},
        version::{Generation, Uid, Version},
    },
    rpc::{
        proto::agent as wire,
        wire::{model_spec_from_wire, model_spec_to_wire},
    },
};

/// What an agent said of one copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyReport {
    /// The model.
    pub model: ModelName,
    /// Which copy of it.
    pub generation: Generation,
    /// Where it stands.
    pub report: Report,
    /// The [`Order::Register`] that it came from; present in inventories.
    pub order: Option<Order>,
}

/// Bytes of each part of a size's key at most; a digest has 64.
const LONGEST_KEY: usize = 256;

fn absent(field: &'static str) -> Refusal {
    Refusal::new(Code::Invalid, format!("{field} is absent; every order and report carries it"))
}

/// The wire form of `resources`.
#[must_use]
pub fn resources_to_wire(resources: &Resources) -> wire::Resources {
    wire::Resources {
        primary: resources.primary.0,
        others: resources.others.iter().map(|(device, bytes)| (device.clone(), bytes.0)).collect(),
    }
}

/// The resources that `wire` means.
#[must_use]
pub fn resources_from_wire(wire: wire::Resources) -> Resources {
    Resources {
        primary: Bytes(wire.primary),
        others: wire.others.into_iter().map(|(device, bytes)| (device, Bytes(bytes))).collect(),
    }
}

/// The wire form of `generation`.
#[must_use]
pub const fn generation_to_wire(generation: Generation) -> wire::GenerationRef {
    wire::GenerationRef { uid: generation.uid.0, version: generation.version.0, number: generation.number }
}

/// The generation that `wire` means.
///
/// # Errors
/// When it is absent.
pub fn generation_from_wire(wire: Option<wire::GenerationRef>) -> Result<Generation, Refusal> {
    let wire = wire.ok_or_else(|| absent("generation"))?;
    Ok(Generation { uid: Uid(wire.uid), version: Version(wire.version), number: wire.number })
}

/// The wire form of `order`.
#[must_use]
pub fn order_to_wire(order: &Order) -> wire::Order {
    use wire::order::Order as Wire;
    wire::Order {
        order: Some(match order {
            Order::Register { model, generation, spec, need, attempt, measured, trust } => {
                Wire::Register(wire::Register {
                    model: model.to_string(),
                    generation: Some(generation_to_wire(*generation)),
                    spec: Some(model_spec_to_wire(spec)),
                    need: Some(resources_to_wire(need)),
                    attempt: *attempt,
                    measured: *measured,
                    trust: trust_to_wire(*trust).into(),
                })
            }
            Order::Unregister { model, generation, drain } => Wire::Unregister(wire::Unregister {
                model: model.to_string(),
                generation: Some(generation_to_wire(*generation)),
                drain_millis: u64::try_from(drain.as_millis()).unwrap_or(u64::MAX),
            }),
        }),
    }
}

/// The order that `wire` means.
///
/// # Errors
/// When a field is absent or can't be what was meant.
pub fn order_from_wire(wire: wire::Order) -> Result<Order, Refusal> {
    use wire::order::Order as Wire;
    match wire.order.ok_or_else(|| absent("order"))? {
        Wire::Register(register) => register_from_wire(register),
        Wire::Unregister(unregister) => Ok(Order::Unregister {
            model: ModelName::try_from(unregister.model)?,
            generation: generation_from_wire(unregister.generation)?,
            drain: Duration::from_millis(unregister.drain_millis),
        }),
    }
}

/// The copy that an order is about, as far as that can be read.
#[must_use]
pub fn order_about(wire: &wire::Order) -> Option<(ModelName, Generation)> {
    use wire::order::Order as Wire;
    let (model, generation) = match wire.order.as_ref()? {
        Wire::Register(register) => (&register.model, register.generation),
        Wire::Unregister(unregister) => (&unregister.model, unregister.generation),
    };
    Some((ModelName::new(model).ok()?, generation_from_wire(generation).ok()?))
}

fn register_from_wire(register: wire::Register) -> Result<Order, Refusal> {
    let trust = match register.trust() {
        wire::Trust::Larger => Trust::Larger,
        wire::Trust::Measured => Trust::Measured,
        wire::Trust::Declared => Trust::Declared,
    };
    Ok(Order::Register {
        model: ModelName::try_from(register.model)?,
        generation: generation_from_wire(register.generation)?,
        spec: Arc::new(model_spec_from_wire(register.spec.ok_or_else(|| absent("spec"))?)?),
        need: resources_from_wire(register.need.ok_or_else(|| absent("need"))?),
        attempt: register.attempt,
        measured: register.measured,
        trust,
    })
}

/// The wire form of `report`.
#[must_use]
pub fn report_to_wire(report: &CopyReport) -> wire::CopyReport {
    use wire::copy_report::State;
    let order = report.order.as_ref().and_then(|order| match order_to_wire(order).order {
        Some(wire::order::Order::Register(register)) => Some(register),
        Some(wire::order::Order::Unregister(_)) | None => None,
    });
    let attempts = match &report.order {
        Some(Order::Register { attempt, .. }) => *attempt,
        Some(Order::Unregister { .. }) | None => 0,
    };
    wire::CopyReport {
        model: report.model.to_string(),
        generation: Some(generation_to_wire(report.generation)),
        state: Some(match &report.report {
            Report::Scheduled => State::Scheduled(wire::Scheduled {}),
            Report::Downloading(Progress { done, total }) => {
                State::Downloading(wire::Downloading { done: *done, total: *total })
            }
            Report::Loading { estimate } => {
                State::Loading(wire::Loading { estimate: estimate.as_deref().map(size_to_wire) })
            }
            Report::Available { residency, measured, estimate } => State::Available(wire::Available {
                residency: residency_to_wire(*residency).into(),
                measured: measured.as_deref().map(size_to_wire),
                estimate: estimate.as_deref().map(size_to_wire),
            }),
            Report::Draining { holds } => State::Draining(wire::Draining { holds: *holds }),
            Report::Unloaded => State::Unloaded(wire::Unloaded {}),
            Report::Failed { failure, freed } => State::Failed(wire::Failed {
                class: class_to_wire(failure.class).into(),
                message: failure.message.clone(),
                attempts,
                freed: *freed,
            }),
        }),
        order,
    }
}

/// The report that `wire` means.
///
/// # Errors
/// When a field is absent or can't be what was meant.
pub fn report_from_wire(wire: wire::CopyReport) -> Result<CopyReport, Refusal> {
    use wire::copy_report::State;
    let report = match wire.state.ok_or_else(|| absent("state"))? {
        State::Scheduled(_) => Report::Scheduled,
        State::Downloading(one) => Report::Downloading(Progress { done: one.done, total: one.total }),
        State::Loading(one) => Report::Loading { estimate: size_from_wire(one.estimate) },
        State::Available(one) => Report::Available {
            residency: match one.residency() {
                wire::available::Residency::Resident => Residency::Resident,
                wire::available::Residency::Evicting => Residency::Evicting,
                wire::available::Residency::Evicted => Residency::Evicted,
                wire::available::Residency::Reloading => Residency::Reloading,
            },
            measured: size_from_wire(one.measured),
            estimate: size_from_wire(one.estimate),
        },
        State::Draining(one) => Report::Draining { holds: one.holds },
        State::Unloaded(_) => Report::Unloaded,
        State::Failed(one) => {
            let class = match one.class() {
                wire::failed::Class::Runtime => FailureClass::Runtime,
                wire::failed::Class::Artifact => FailureClass::Artifact,
                wire::failed::Class::Authorisation => FailureClass::Authorisation,
                wire::failed::Class::Memory => FailureClass::Memory,
                wire::failed::Class::Timeout => FailureClass::Timeout,
                wire::failed::Class::Incompatible => FailureClass::Incompatible,
            };
            Report::Failed { failure: Failure { class, message: one.message }, freed: one.freed }
        }
    };
    Ok(CopyReport {
        model: ModelName::try_from(wire.model)?,
        generation: generation_from_wire(wire.generation)?,
        report,
        order: wire.order.map(register_from_wire).transpose()?,
    })
}

fn size_to_wire(size: &Size) -> wire::Size {
    let Size { key: SizeKey { artifact, runtime, configuration }, bytes } = size.clone();
    wire::Size { bytes: Some(resources_to_wire(&bytes)), artifact, runtime, configuration }
}

/// A size without bytes, or of nothing that has a digest, says nothing; nor does one that could be no row's key.
fn size_from_wire(wire: Option<wire::Size>) -> Option<Box<Size>> {
    let wire::Size { bytes, artifact, runtime, configuration } = wire?;
    let bytes = resources_from_wire(bytes?);
    let sound = |part: &String| part.len() <= LONGEST_KEY && !part.contains('\0');
    let known =
        !artifact.is_empty() && !bytes.is_zero() && [&artifact, &runtime, &configuration].into_iter().all(sound);
    known.then(|| Box::new(Size { key: SizeKey { artifact, runtime, configuration }, bytes }))
}

const fn trust_to_wire(trust: Trust) -> wire::Trust {
    match trust {
        Trust::Larger => wire::Trust::Larger,
        Trust::Measured => wire::Trust::Measured,
        Trust::Declared => wire::Trust::Declared,
    }
}

const fn residency_to_wire(residency: Residency) -> wire::available::Residency {
    match residency {
        Residency::Resident => wire::available::Residency::Resident,
        Residency::Evicting => wire::available::Residency::Evicting,
        Residency::Evicted => wire::available::Residency::Evicted,
        Residency::Reloading => wire::available::Residency::Reloading,
    }
}

const fn class_to_wire(class: FailureClass) -> wire::failed::Class {
    match class {
        FailureClass::Artifact => wire::failed::Class::Artifact,
        FailureClass::Authorisation => wire::failed::Class::Authorisation,
        FailureClass::Memory => wire::failed::Class::Memory,
        FailureClass::Runtime => wire::failed::Class::Runtime,
        FailureClass::Timeout => wire::failed::Class::Timeout,
        FailureClass::Incompatible => wire::failed::Class::Incompatible,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::spec::ModelSpec;

    fn size() -> Size {
        let key = SizeKey { artifact: "ab".to_owned(), runtime: "mlserver".to_owned(), configuration: "2".to_owned() };
        Size { key, bytes: Resources::primary(Bytes(3)) }
    }

    fn register() -> Order {
        let mut need = Resources::primary(Bytes(7));
        need.others.insert("gpu0".to_owned(), Bytes(9));
        Order::Register {
            model: ModelName::new("iris").expect("valid"),
            generation: Generation { uid: Uid(4), version: Version(2), number: 3 },
            spec: Arc::new(ModelSpec { uri: "/m".to_owned(), ..ModelSpec::default() }),
            need,
            attempt: 5,
            measured: true,
            trust: Trust::Declared,
        }
    }

    #[test]
    fn orders_come_back_as_they_went() {
        let unregister = Order::Unregister {
            model: ModelName::new("iris").expect("valid"),
            generation: Generation { uid: Uid(4), version: Version(2), number: 3 },
            drain: Duration::from_millis(1500),
        };
        for order in [register(), unregister] {
            assert_eq!(order_from_wire(order_to_wire(&order)), Ok(order));
        }
    }

    #[test]
    fn reports_come_back_as_they_went() {
        let classes = [
            FailureClass::Artifact,
            FailureClass::Authorisation,
            FailureClass::Memory,
            FailureClass::Runtime,
            FailureClass::Timeout,
            FailureClass::Incompatible,
        ];
        let residencies = [Residency::Resident, Residency::Evicting, Residency::Evicted, Residency::Reloading];
        let mut reports = vec![
            Report::Scheduled,
            Report::Downloading(Progress { done: 1, total: None }),
            Report::Downloading(Progress { done: 1, total: Some(2) }),
            Report::Loading { estimate: Some(Box::new(size())) },
            Report::Draining { holds: 4 },
            Report::Unloaded,
        ];
        reports.extend(classes.map(|class| Report::Failed {
            failure: Failure { class, message: "why".to_owned() },
            freed: class == FailureClass::Memory,
        }));
        reports.extend(residencies.map(|residency| Report::Available {
            residency,
            measured: (residency == Residency::Resident).then(|| Box::new(size())),
            estimate: (residency == Residency::Evicted).then(|| Box::new(size())),
        }));
        for report in reports {
            let order = register();
            let report =
                CopyReport { model: order.model().clone(), generation: order.generation(), report, order: Some(order) };
            assert_eq!(report_from_wire(report_to_wire(&report)), Ok(report));
        }
    }

    #[test]
    fn what_is_absent_is_named() {
        let mut order = order_to_wire(&register());
        if let Some(wire::order::Order::Register(register)) = &mut order.order {
            register.need = None;
        }
        let refusal = order_from_wire(order).expect_err("no need");
        assert_eq!((refusal.code, refusal.message.contains("need")), (Code::Invalid, true));
    }
}
