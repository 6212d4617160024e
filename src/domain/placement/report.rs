//! What a placement found: kept as data, printed by whoever is asked.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::Serialize;

use super::{
    filter::{Filter, Rejection},
    problem::Capabilities,
    replica::{beside, on_device},
    score::{Score, Warmth},
};
use crate::domain::{
    memory::{Bytes, Resources},
    names::{ModelName, ReplicaId, ServerName},
    version::Generation,
};

/// Why no replica could be chosen. Small and cheap to clone: as many of these are kept as copies wait.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Unplaced(Arc<Findings>);

/// What stands behind an [`Unplaced`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Replicas that there were.
    pub replicas: u32,
    /// Memory that the copy needs; nothing at all when its size was not known.
    pub need: Resources,
    /// Replicas by the first filter that refused them.
    pub rejected: BTreeMap<Filter, u32>,
    /// The replica that lacks nothing but memory, and least of it.
    pub nearest: Option<NearestMiss>,
    /// The capabilities that ruled out all servers in question.
    pub gap: Option<CapabilityGap>,
    /// The server that the manifest names.
    pub server: Option<ServerName>,
    /// The server that the version's other copies keep it on.
    pub anchor: Option<ServerName>,
    /// Some servers that there are, when the one that the manifest names is not.
    pub known: Vec<ServerName>,
}

/// How little was missing where least was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NearestMiss {
    /// The replica.
    pub replica: ReplicaId,
    /// The device on which most is missing there; absent for the primary one.
    pub device: Option<String>,
    /// Bytes missing on it.
    pub missing: Bytes,
    /// Whether fewer would be missing if no copy were pinned.
    pub beside_pinned: bool,
}

/// Requirements that no server in question meets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CapabilityGap {
    /// Those that none of them has; empty when each is somewhere, but nowhere all of them.
    pub missing: Vec<String>,
    /// All that are required.
    pub required: Capabilities,
    /// What servers have instead: one of each kind, at most four kinds.
    pub servers: Vec<(ServerName, Capabilities)>,
    /// Kinds of servers that are not among them.
    pub more: u32,
}

impl Unplaced {
    pub(super) fn new(findings: Findings) -> Self {
        Self(Arc::new(findings))
    }

    /// The data.
    #[must_use]
    pub fn findings(&self) -> &Findings {
        &self.0
    }

    /// How many replicas `filter` was the first to refuse.
    #[must_use]
    pub fn rejected(&self, filter: Filter) -> u32 {
        self.0.rejected.get(&filter).copied().unwrap_or(0)
    }

    /// One sentence that says what stands in the way, for someone who has never seen the code.
    #[must_use]
    pub fn summary(&self) -> String {
        let found = &*self.0;
        if found.need.is_zero() {
            return "its size is not known, and an unknown size never counts as zero; set memory in its manifest"
                .to_owned();
        }
        if found.replicas == 0 {
            return "no server replica has registered".to_owned();
        }
        if let (Some(server), Some(anchor)) = (&found.server, &found.anchor)
            && server != anchor
        {
            return format!(
                "it is to be on server {server}, but its other copies are on server {anchor} and it stays on one"
            );
        }
        if let Some(server) = &found.server
            && self.rejected(Filter::Server) == found.replicas
        {
            let known = list(found.known.iter().map(ServerName::as_str));
            return format!("server {server}, which its manifest names, has no replicas (servers: {known})");
        }
        let on = match (&found.server, &found.anchor) {
            (Some(server), _) => format!(" on server {server}, which its manifest names"),
            (None, Some(server)) => format!(" on server {server}, where its other copies are"),
            (None, None) => String::new(),
        };
        match &found.gap {
            Some(gap) => gap.summary(found.server.as_ref().or(found.anchor.as_ref())),
            None => self.matching(&on),
        }
    }

    /// The sentence when some replicas are of the right kind.
    fn matching(&self, on: &str) -> String {
        let reasons: Vec<(Filter, u32)> = self
            .0
            .rejected
            .iter()
            .filter(|(filter, _)| !matches!(filter, Filter::Server | Filter::Anchor | Filter::Capabilities))
            .map(|(filter, replicas)| (*filter, *replicas))
            .collect();
        let matching: u32 = reasons.iter().map(|(_, replicas)| replicas).sum();
        let mut text = match matching {
            0 => return format!("no replica matches{on}"),
            1 => format!("1 replica matches{on}"),
            _ => format!("{matching} replicas match{on}"),
        };
        match reasons.as_slice() {
            [(filter, 1)] => {
                text += &format!(", and it {}", self.phrase(*filter, 1));
            }
            [(filter, _)] => {
                text += &format!(", each {}", self.phrase(*filter, 1));
            }
            reasons => {
                for (at, (filter, replicas)) in reasons.iter().enumerate() {
                    let before = if at == 0 { ":" } else { "," };
                    text += &format!("{before} {replicas} {}", self.phrase(*filter, *replicas));
                }
            }
        }
        if let Some(nearest) = &self.0.nearest
            && matching > 1
        {
            text += &format!("; the nearest is {}", nearest.replica);
        }
        match self.rejected(Filter::Capabilities) {
            0 => {}
            1 => text.push_str("; 1 more lacks its requirements"),
            more => {
                text += &format!("; {more} more lack its requirements");
            }
        }
        text
    }

    /// What `filter` says of `replicas` replicas.
    fn phrase(&self, filter: Filter, replicas: u32) -> String {
        let one = replicas == 1;
        let is = if one { "is" } else { "are" };
        match filter {
            Filter::Server | Filter::Anchor => format!("{is} of another server"),
            Filter::Capabilities => format!("{} its requirements", if one { "lacks" } else { "lack" }),
            Filter::Available => format!("{is} not available"),
            Filter::Draining => format!("{is} draining"),
            Filter::Cordoned => format!("{is} cordoned"),
            Filter::OverLimit => format!("{is} over the memory limit"),
            Filter::Held => format!("already {} this version", if one { "holds" } else { "hold" }),
            Filter::Failed => "failed to load it of late".to_owned(),
            Filter::TooBig => format!("{is} smaller than the {} it needs", shown(&self.0.need)),
            Filter::Memory => {
                let lacks = if one { "lacks" } else { "lack" };
                match &self.0.nearest {
                    // The nearest may be one of those that are too small; then this says less, and no less than true.
                    Some(nearest) => {
                        let (on, beside) = (on_device(nearest.device.as_deref()), beside(nearest.beside_pinned));
                        format!("{lacks} at least {}{on}{beside}", nearest.missing)
                    }
                    None => format!("{lacks} memory"),
                }
            }
        }
    }
}

impl fmt::Display for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())
    }
}

impl CapabilityGap {
    fn summary(&self, server: Option<&ServerName>) -> String {
        let named = |names: &[&str]| match names {
            [one] => format!("the capability {one}"),
            several => format!("the capabilities {}", several.join(", ")),
        };
        let missing: Vec<&str> = self.missing.iter().map(String::as_str).collect();
        let required: Vec<&str> = self.required.iter().collect();
        let together = if missing.is_empty() { " together" } else { "" };
        let wanted = named(if missing.is_empty() { &required } else { &missing });
        let mut text = match server {
            Some(server) => format!("server {server} does not have {wanted}{together} ("),
            None => format!("no server has {wanted}{together} (servers: "),
        };
        for (at, (name, capabilities)) in self.servers.iter().enumerate() {
            if at > 0 {
                text.push_str("; ");
            }
            if server.is_none() {
                text += &format!("{name} ");
            }
            text += &format!("has {}", list(capabilities.iter()));
        }
        if self.more > 0 {
            text += &format!("; and {} more kinds", self.more);
        }
        text.push(')');
        text
    }
}

/// Names in a row, at most eight.
fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let mut names: Vec<&str> = names.collect();
    if names.is_empty() {
        return "none".to_owned();
    }
    if names.len() > SHOWN {
        names.truncate(SHOWN);
        names.push("...");
    }
    names.join(", ")
}

/// Bytes by device: `1 GiB`, `1 GiB and 2 GiB on gpu0`.
fn shown(resources: &Resources) -> String {
    let devices = resources.devices().filter(|(_, bytes)| *bytes > Bytes::ZERO);
    let each: Vec<String> = devices.map(|(device, bytes)| format!("{bytes}{}", on_device(device))).collect();
    each.join(" and ")
}

/// A decision with everything that led to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
    /// Memory that it needs.
    pub need: Resources,
    /// What the replica must be capable of.
    pub requirements: Capabilities,
    /// Every replica, by server and index.
    pub candidates: Vec<Candidate>,
    /// The replica that is chosen.
    pub chosen: Option<ReplicaId>,
    /// Why none is.
    pub unplaced: Option<Unplaced>,
    /// What would have to be different for one to be.
    pub short: Option<Short>,
}

/// One replica's part of a decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// The replica.
    pub replica: ReplicaId,
    /// What every filter that refuses it says, in the order in which they are asked.
    pub rejections: Vec<Rejection>,
    /// How good it is, when no filter refuses it.
    pub score: Option<Score>,
    /// Bytes left within its memory.
    pub free: Resources,
    /// The largest copy that it could take.
    pub room: Resources,
}

/// The least memory that would have to be freed, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Short {
    /// The device on which most is missing; absent for the primary one.
    pub device: Option<String>,
    /// Bytes missing on it.
    pub missing: Bytes,
    /// The replicas on any one of which that would do, at most sixteen of them.
    pub replicas: Vec<ReplicaId>,
    /// How many they are in all.
    pub count: u32,
}

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {} more{}", self.missing, on_device(self.device.as_deref()))?;
        match self.replicas.as_slice() {
            [one] => write!(f, " on {one}"),
            replicas => {
                let names: Vec<String> = replicas.iter().take(3).map(ToString::to_string).collect();
                let more = if names.len() < replicas.len() { ", ..." } else { "" };
                write!(f, " on any of {} replicas ({}{more})", self.count, names.join(", "))
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Replicas shown of each server; the data have them all.
        const SHOWN: usize = 20;
        write!(f, "{} copy {} needs {}", self.model, self.generation.number, shown(&self.need))?;
        if self.requirements.iter().next().is_some() {
            write!(f, " and {}", list(self.requirements.iter()))?;
        }
        writeln!(f)?;
        for replicas in self.candidates.chunk_by(|a, b| a.replica.server == b.replica.server) {
            if let Some(first) = replicas.first() {
                writeln!(f, "server {}", first.replica.server)?;
            }
            for candidate in replicas.iter().take(SHOWN) {
                let mark = if self.chosen.as_ref() == Some(&candidate.replica) { '*' } else { ' ' };
                writeln!(f, "{mark} {}: {}", candidate.replica, candidate.verdict())?;
            }
            if replicas.len() > SHOWN {
                writeln!(f, "  and {} more replicas", replicas.len() - SHOWN)?;
            }
        }
        match (&self.chosen, &self.unplaced) {
            (Some(chosen), _) => write!(f, "chosen: {chosen}"),
            (None, Some(unplaced)) => write!(f, "not placed: {}", unplaced.summary()),
            (None, None) => f.write_str("not placed"),
        }?;
        match &self.short {
            Some(short) => write!(f, "\nit {short}"),
            None => Ok(()),
        }
    }
}

impl Candidate {
    fn verdict(&self) -> String {
        let Some(score) = &self.score else {
            if self.rejections.is_empty() {
                return "can't be judged, since the size is not known".to_owned();
            }
            return self.rejections.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        };
        let mut parts = Vec::new();
        if score.stranded > 0 {
            parts.push(format!("{} other copies would find no place on its server", score.stranded));
        }
        match score.warmth {
            Warmth::Resident => parts.push("has the version in memory".to_owned()),
            Warmth::OnDisk => parts.push("has the artifact on disk".to_owned()),
            Warmth::Cold => {}
        }
        if score.evicts {
            parts.push("has to evict other models".to_owned());
        }
        if score.beside > 0 {
            parts.push(format!("{} other copies are on its server", score.beside));
        }
        let copies = if score.copies == 1 { "copy" } else { "copies" };
        parts.push(format!("{} used by {} {copies}", score.used, score.copies));
        format!("fits: {}", parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(name: &str) -> ServerName {
        ServerName::new(name).expect("a name")
    }

    fn unplaced(rejected: &[(Filter, u32)], edit: impl FnOnce(&mut Findings)) -> Unplaced {
        let mut findings = Findings {
            replicas: rejected.iter().map(|(_, replicas)| replicas).sum(),
            need: Resources::primary(Bytes(1 << 30)),
            rejected: rejected.iter().copied().collect(),
            ..Findings::default()
        };
        edit(&mut findings);
        Unplaced::new(findings)
    }

    fn near(findings: &mut Findings) {
        findings.nearest = Some(NearestMiss {
            replica: ReplicaId::new(server("mlserver"), 3),
            device: None,
            missing: Bytes(200 << 20),
            beside_pinned: false,
        });
    }

    #[test]
    fn one_sentence_says_what_stands_in_the_way() {
        let triton = (server("triton"), Capabilities::new(["onnx", "python"]));
        for (unplaced, text) in [
            (
                Unplaced::default(),
                "its size is not known, and an unknown size never counts as zero; set memory in its manifest",
            ),
            (unplaced(&[], |_| {}), "no server replica has registered"),
            (
                unplaced(&[(Filter::Capabilities, 2)], |found| {
                    found.gap = Some(CapabilityGap {
                        missing: vec!["sklearn".to_owned()],
                        required: Capabilities::new(["sklearn"]),
                        servers: vec![triton.clone()],
                        more: 0,
                    });
                }),
                "no server has the capability sklearn (servers: triton has onnx, python)",
            ),
            (
                unplaced(&[(Filter::Capabilities, 2)], |found| {
                    found.gap = Some(CapabilityGap {
                        missing: vec![],
                        required: Capabilities::new(["b", "a"]),
                        servers: vec![triton.clone(), (server("bare"), Capabilities::default())],
                        more: 3,
                    });
                }),
                "no server has the capabilities a, b together (servers: triton has onnx, python; bare has none; and 3 \
                 more kinds)",
            ),
            (
                unplaced(&[(Filter::Server, 2)], |found| {
                    found.server = Some(server("gone"));
                    found.known = vec![server("a"), server("b")];
                }),
                "server gone, which its manifest names, has no replicas (servers: a, b)",
            ),
            (
                unplaced(&[(Filter::Memory, 12)], near),
                "12 replicas match, each lacks at least 200 MiB; the nearest is mlserver-3",
            ),
            (unplaced(&[(Filter::Memory, 1)], near), "1 replica matches, and it lacks at least 200 MiB"),
            (
                unplaced(&[(Filter::Memory, 1)], |found| {
                    near(found);
                    found.nearest.as_mut().expect("near").beside_pinned = true;
                }),
                "1 replica matches, and it lacks at least 200 MiB beside pinned copies",
            ),
            (
                unplaced(
                    &[(Filter::Memory, 9), (Filter::Cordoned, 2), (Filter::Held, 1), (Filter::Capabilities, 4)],
                    near,
                ),
                "12 replicas match: 2 are cordoned, 1 already holds this version, 9 lack at least 200 MiB; the nearest \
                 is mlserver-3; 4 more lack its requirements",
            ),
            (
                unplaced(&[(Filter::Anchor, 7), (Filter::Held, 2)], |found| found.anchor = Some(server("a"))),
                "2 replicas match on server a, where its other copies are, each already holds this version",
            ),
            (
                unplaced(&[(Filter::Server, 7), (Filter::TooBig, 1)], |found| found.server = Some(server("a"))),
                "1 replica matches on server a, which its manifest names, and it is smaller than the 1 GiB it needs",
            ),
        ] {
            assert_eq!(unplaced.summary(), text);
        }
    }
}
