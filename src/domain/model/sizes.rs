//! What the model's versions were found to take in memory.
//!
//! The rules of this module: of several measurements of the same thing the largest counts, so that two replicas that
//! differ a little do not take turns, and so does the largest guess of a version; a guess outlives the copy that it was made
//! for, or the next one would be placed for as little as that; what no version is known to be of any more is forgotten.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde_json::json;

use super::{Decision, Effect, Entry, Model, Policy};
use crate::domain::{
    copy::{Report, State},
    memory::{Bytes, Resources},
    record::{SizeRow, Write},
    size::{self, Known, Size, SizeKey},
    spec::{ModelSpec, RuntimeInfo},
    version::{Generation, Version},
};

/// Sizes that are kept of one model at most; beyond, the first is forgotten.
const MOST: usize = 64;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    measured: BTreeMap<SizeKey, Measured>,
    /// The largest guess that agents made of each version. In no journal: agents say it again.
    guessed: BTreeMap<Version, Resources>,
    /// What each copy is of.
    of: BTreeMap<Generation, SizeKey>,
    misdeclared: BTreeMap<Version, Misdeclared>,
}

/// A version declares memory that differs too much from what was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misdeclared {
    /// The version.
    pub version: Version,
    /// What it declares, of all instances.
    pub declared: Bytes,
    /// What was measured.
    pub measured: Bytes,
}

impl fmt::Display for Misdeclared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, declared, measured } = self;
        write!(f, "version {version} declares {declared} and takes {measured}; correct its memory")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Measured {
    bytes: Resources,
    /// Versions that are of this artifact.
    versions: BTreeSet<Version>,
}

impl Model {
    /// Takes in what the journal has of its sizes.
    #[must_use]
    pub fn with_sizes(mut self, rows: Vec<SizeRow>) -> Self {
        for SizeRow { key, bytes, versions, .. } in rows {
            self.sizes.measured.insert(key, Measured { bytes, versions });
        }
        self
    }

    /// What was measured of a copy's kind, once that is known.
    #[must_use]
    pub fn measured(&self, copy: Generation) -> Option<&Resources> {
        self.sizes.of.get(&copy).and_then(|key| self.sizes.measured.get(key)).map(|measured| &measured.bytes)
    }

    /// What was measured of a version, wherever; the most, if its runtimes differ. Versions of the same spec count as
    /// the same artifact.
    #[must_use]
    pub fn measured_version(&self, version: Version) -> Option<Resources> {
        let alike = |other: &Version| self.is_alike(version, *other);
        let sizes = self.sizes.measured.values().filter(|measured| measured.versions.iter().any(alike));
        sizes.map(|measured| measured.bytes.clone()).reduce(|a, b| a.max(&b))
    }

    /// What agents guessed of a version, as [`measured_version`](Self::measured_version).
    fn guessed_version(&self, version: Version) -> Option<Resources> {
        let alike = self.sizes.guessed.iter().filter(|(other, _)| self.is_alike(version, **other));
        alike.map(|(_, bytes)| bytes.clone()).reduce(|a, b| a.max(&b))
    }

    fn is_alike(&self, version: Version, other: Version) -> bool {
        let specs = self.entry(version).zip(self.entry(other));
        specs.is_some_and(|(one, other)| one.version == other.version || one.spec.same_version(&other.spec))
    }

    /// What a version declares, times the instances that the runtime is known to make.
    #[must_use]
    pub fn declared(&self, version: Version) -> Option<Bytes> {
        declared(&self.entry(version)?.spec)
    }

    /// The versions that declare something too different from what was measured.
    pub fn misdeclared(&self) -> impl Iterator<Item = &Misdeclared> {
        self.sizes.misdeclared.values()
    }

    /// Compares what a version declares with what was measured, and says so once when they differ too much.
    fn compare(&mut self, version: Version, policy: &Policy, decision: &mut Decision) {
        let found = self.declared(version).zip(self.measured_version(version));
        let found = found.map(|(declared, measured)| Misdeclared { version, declared, measured: measured.primary });
        match found.filter(|found| size::differ(found.declared, found.measured, policy.memory_warning_percent)) {
            Some(found) => {
                if self.sizes.misdeclared.insert(version, found).is_none() {
                    let data = json!({ "version": version.0, "declared": found.declared, "measured": found.measured });
                    decision.note("Misdeclared", found.to_string(), &data);
                }
            }
            None => drop(self.sizes.misdeclared.remove(&version)),
        }
    }

    /// Memory that a new copy of a version is to have.
    pub(super) fn need(&self, entry: &Entry, policy: &Policy) -> Resources {
        let (measured, guessed) = (self.measured_version(entry.version), self.guessed_version(entry.version));
        let known = Known { declared: declared(&entry.spec), measured: measured.as_ref(), estimated: guessed.as_ref() };
        known.counts(policy.trust, policy.default_memory)
    }

    /// Takes what an agent says of a copy's size.
    pub(super) fn weigh(&mut self, index: usize, report: &Report, policy: &Policy, decision: &mut Decision) {
        let (size, is_measured) = match report {
            Report::Available { measured: Some(size), .. } => (size, true),
            Report::Loading { estimate: Some(size) }
            | Report::Available { measured: None, estimate: Some(size), .. } => (size, false),
            Report::Loading { estimate: None }
            | Report::Available { measured: None, estimate: None, .. }
            | Report::Scheduled
            | Report::Downloading(_)
            | Report::Draining { .. }
            | Report::Unloaded
            | Report::Failed { .. } => return,
        };
        if size.bytes.is_zero() {
            return;
        }
        let generation = self.copies[index].generation;
        self.sizes.of.insert(generation, size.key.clone());
        if is_measured {
            self.learn(generation.version, size, policy, decision);
        } else {
            let guessed = self.sizes.guessed.entry(generation.version).or_default();
            *guessed = guessed.max(&size.bytes);
            if let Some(known) = self.sizes.measured.get_mut(&size.key)
                && known.versions.insert(generation.version)
            {
                // Another version of the same artifact.
                decision.writes.extend(self.size_row(&size.key));
            }
        }
        let estimated = (!is_measured).then_some(&size.bytes);
        for index in 0..self.copies.len() {
            let copy = self.copies[index].generation;
            if self.sizes.of.get(&copy) == Some(&size.key) {
                self.resize(index, estimated.filter(|_| copy == generation), policy, decision);
            }
        }
        self.ask_anew(policy, decision);
    }

    fn learn(&mut self, version: Version, size: &Size, policy: &Policy, decision: &mut Decision) {
        let known = self.sizes.measured.get(&size.key);
        let bytes = known.map_or_else(|| size.bytes.clone(), |known| known.bytes.max(&size.bytes));
        if known.is_some_and(|known| known.bytes == bytes && known.versions.contains(&version)) {
            // Known from the journal, perhaps, and not compared since.
            return self.compare(version, policy, decision);
        }
        if known.is_none()
            && self.sizes.measured.len() >= MOST
            && let Some((key, _)) = self.sizes.measured.pop_first()
        {
            decision.writes.push(Write::RemoveSize(self.name.clone(), key));
        }
        let mut versions = self.sizes.measured.get(&size.key).map(|known| known.versions.clone()).unwrap_or_default();
        versions.insert(version);
        self.sizes.measured.insert(size.key.clone(), Measured { bytes: bytes.clone(), versions });
        decision.writes.extend(self.size_row(&size.key));
        let Size { key: SizeKey { artifact, runtime, configuration }, .. } = size;
        let data = json!({
            "version": version.0, "artifact": artifact, "runtime": runtime, "configuration": configuration,
            "measured": bytes, "declared": self.declared(version),
        });
        decision.note("Measured", format!("version {version} takes {} in {runtime}", bytes.primary), &data);
        self.compare(version, policy, decision);
    }

    /// Has a copy's place be as large as what is known of it. An estimate counts only until there is a measurement.
    fn resize(&mut self, index: usize, estimated: Option<&Resources>, policy: &Policy, decision: &mut Decision) {
        let copy = &self.copies[index];
        let generation = copy.generation;
        let Some(entry) = self.entry(generation.version) else { return };
        let measured = self.measured(generation);
        let declared = declared(&entry.spec);
        if measured.is_none() && (estimated.is_none() || declared.is_some()) {
            return;
        }
        let need = Known { declared, measured, estimated }.counts(policy.trust, policy.default_memory);
        if need == copy.need || copy.state.replica().is_none() {
            return;
        }
        self.copies[index].need = need;
        decision.writes.extend(self.copy_row(index));
        decision.effects.push(Effect::Keep(generation));
    }

    /// Asks for a place of the right size for copies that wait for one.
    fn ask_anew(&mut self, policy: &Policy, decision: &mut Decision) {
        for index in 0..self.copies.len() {
            let copy = &self.copies[index];
            let Some(entry) = self.entry(copy.generation.version) else { continue };
            let need = self.need(entry, policy);
            if matches!(copy.state, State::Pending { .. }) && copy.need != need {
                self.copies[index].need = need;
                decision.effects.extend(self.place(&self.copies[index]));
            }
        }
    }

    fn size_row(&self, key: &SizeKey) -> Option<Write> {
        let Measured { bytes, versions } = self.sizes.measured.get(key)?.clone();
        Some(Write::PutSize(Box::new(SizeRow { model: self.name.clone(), key: key.clone(), bytes, versions })))
    }

    /// Forgets sizes of versions that are not kept any more, and copies that are gone.
    pub(super) fn tidy_sizes(&mut self, decision: &mut Decision) {
        let copies = &self.copies;
        self.sizes.of.retain(|generation, _| copies.iter().any(|copy| copy.generation == *generation));
        let versions = &self.versions;
        self.sizes.misdeclared.retain(|version, _| versions.iter().any(|entry| entry.version == *version));
        let kept: BTreeSet<Version> = self.versions.iter().map(|entry| entry.version).collect();
        self.keep_sizes(|version| kept.contains(version), decision);
    }

    /// Forgets that sizes are of versions that are not to be kept.
    pub(super) fn keep_sizes(&mut self, keep: impl Fn(&Version) -> bool, decision: &mut Decision) {
        self.sizes.guessed.retain(|version, _| keep(version));
        let stale = |measured: &Measured| !measured.versions.iter().all(&keep);
        let changed: Vec<SizeKey> =
            self.sizes.measured.iter().filter(|(_, size)| stale(size)).map(|(key, _)| key.clone()).collect();
        for key in changed {
            if let Some(size) = self.sizes.measured.get_mut(&key) {
                size.versions.retain(&keep);
                if size.versions.is_empty() {
                    self.sizes.measured.remove(&key);
                    decision.writes.push(Write::RemoveSize(self.name.clone(), key));
                    continue;
                }
            }
            decision.writes.extend(self.size_row(&key));
        }
    }
}

/// What a version declares, times the instances that the runtime is known to make.
fn declared(spec: &ModelSpec) -> Option<Bytes> {
    let declared = spec.memory.filter(|bytes| *bytes != Bytes::ZERO)?;
    Some(Bytes(declared.0.saturating_mul(instances(spec))))
}

fn instances(spec: &ModelSpec) -> u64 {
    match &spec.runtime {
        Some(RuntimeInfo::MlServer { parallel_workers }) => u64::from((*parallel_workers).max(1)),
        Some(RuntimeInfo::Triton { cpu }) => u64::from(cpu.first().copied().unwrap_or(1).max(1)),
        None => 1,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        copy::{self, Residency},
        model::{Event, Wanted, restore},
        names::{ModelName, ReplicaId, ServerName},
        placement::{Placed, Placement, PlacementRequest, ReplicaFacts, report::Unplaced},
        replica::ReplicaState,
        size::Trust,
        spec::{Definition, DeploymentPatch, Passthrough, Replicas},
        time::Instant,
        version::Uid,
    };

    const NOW: Instant = Instant::from_micros(1_000_000);
    /// Of a model that says nothing, in tests with small numbers.
    const DEFAULT: Bytes = Bytes(256);

    fn definition(uri: &str, memory: Option<u64>, replicas: u32) -> Event {
        let spec = ModelSpec { uri: uri.to_owned(), memory: memory.map(Bytes), ..ModelSpec::default() };
        let replicas = Replicas { replicas, min: 0, max: 0, log_payloads: false };
        let deployment = DeploymentPatch { replicas: Some(replicas), ..DeploymentPatch::default() };
        let name = ModelName::new("m").expect("valid");
        let (kubernetes, passthrough) = (None, Passthrough::default());
        Event::Submit(Box::new(Definition { name, spec, deployment, kubernetes, passthrough }), Uid(1))
    }

    struct World {
        model: Model,
        policy: Policy,
        writes: Vec<Write>,
        effects: Vec<Effect>,
    }

    impl World {
        fn new(policy: Policy) -> Self {
            let model = Model::unborn(ModelName::new("m").expect("valid"), NOW);
            Self { model, policy, writes: Vec::new(), effects: Vec::new() }
        }

        fn happen(&mut self, event: Event) {
            let decision = self.model.apply(event, &self.policy, NOW).expect("sound");
            self.writes = decision.writes;
            self.effects = decision.effects;
        }

        /// The newest copy, placed on that replica.
        fn place(&mut self, index: u32) -> Generation {
            let pending = self.model.copies.iter().find(|copy| copy.state.replica().is_none()).expect("one waits");
            let generation = pending.generation;
            self.happen(Event::Copy(generation, copy::Event::Placed { on: on(index) }));
            generation
        }

        fn report(&mut self, index: u32, generation: Generation, report: Report) {
            self.happen(Event::Reported(on(index), generation, Some(report)));
        }

        fn measured(&mut self, index: u32, generation: Generation, size: Size) {
            let (residency, measured) = (Residency::Resident, Some(Box::new(size)));
            let report = Report::Available { residency, measured, estimate: None, pinned: false };
            self.report(index, generation, report);
        }

        fn need(&self, generation: Generation) -> u64 {
            self.model.copies.iter().find(|copy| copy.generation == generation).expect("there").need.primary.0
        }

        fn notes(&self, kind: &str) -> usize {
            self.effects.iter().filter(|effect| matches!(effect, Effect::Note(note) if note.kind == kind)).count()
        }
    }

    fn on(index: u32) -> ReplicaId {
        ReplicaId::new(ServerName::new("s").expect("valid"), index)
    }

    fn size(artifact: &str, bytes: u64) -> Size {
        let (runtime, configuration) = ("oip".to_owned(), "1".to_owned());
        let key = SizeKey { artifact: artifact.to_owned(), runtime, configuration };
        Size { key, bytes: Resources::primary(Bytes(bytes)) }
    }

    #[test]
    fn without_a_declared_size_the_default_counts_then_the_estimate_then_the_measurement() {
        let mut world = World::new(Policy::default());
        world.happen(definition("/a", None, 2));
        let (first, second) = (world.place(0), world.place(1));
        assert_eq!(world.need(first), 256 << 20);
        world.report(0, first, Report::Loading { estimate: Some(Box::new(size("a", 900))) });
        assert_eq!(world.need(first), 900);
        assert!(world.effects.contains(&Effect::Keep(first)), "the ledger has to follow: {:?}", world.effects);
        assert!(world.writes.iter().any(|write| matches!(write, Write::PutCopy(row) if row.need.primary.0 == 900)));
        world.report(1, second, Report::Loading { estimate: Some(Box::new(size("a", 900))) });
        world.measured(0, first, size("a", 300));
        assert_eq!((world.need(first), world.need(second)), (300, 300), "it is the same artifact");
        assert!(world.writes.iter().any(|write| matches!(write, Write::PutSize(_))));
        world.happen(Event::Scale(3));
        let third = world.place(2);
        assert_eq!(world.need(third), 300, "every later copy counts for it");
        // A smaller one elsewhere does not take turns with it; a larger one counts.
        world.measured(1, second, size("a", 200));
        assert_eq!(world.need(second), 300);
        world.measured(1, second, size("a", 400));
        assert_eq!((world.need(first), world.need(second)), (400, 400));
    }

    #[test]
    fn a_waiting_copy_asks_again_for_what_was_measured() {
        let mut world = World::new(Policy::default());
        world.happen(definition("/a", None, 2));
        let first = world.place(0);
        world.measured(0, first, size("a", 5));
        let asked = world.effects.iter().find_map(|effect| match effect {
            Effect::Place(wanted) => Some(wanted.need.primary.0),
            _ => None,
        });
        assert_eq!(asked, Some(5));
    }

    #[test]
    fn of_declared_and_measured_the_larger_counts_and_a_great_difference_is_told_once() {
        let mebibytes = |(trust, size): (Trust, u64)| (trust, size << 20);
        for (trust, expected) in [(Trust::Larger, 1000), (Trust::Measured, 300), (Trust::Declared, 1000)].map(mebibytes)
        {
            let mut world = World::new(Policy { trust, ..Policy::default() });
            world.happen(definition("/a", Some(1000 << 20), 1));
            let copy = world.place(0);
            world.report(0, copy, Report::Loading { estimate: Some(Box::new(size("a", 9000 << 20))) });
            assert_eq!(world.need(copy), 1000 << 20, "a guess says nothing against a declaration");
            world.measured(0, copy, size("a", 300 << 20));
            assert_eq!((world.need(copy), world.notes("Misdeclared")), (expected, 1), "{trust:?}");
            assert_eq!(world.model.misdeclared().count(), 1);
            world.measured(0, copy, size("a", 301 << 20));
            assert_eq!(world.notes("Misdeclared"), 0);
            world.measured(0, copy, size("a", 900 << 20));
            assert_eq!(world.model.misdeclared().count(), 0);
        }
    }

    #[test]
    fn an_order_says_that_its_need_was_measured_only_when_that_is_within_it() {
        for (trust, expected) in [(Trust::Larger, true), (Trust::Measured, true), (Trust::Declared, false)] {
            let mut world = World::new(Policy { trust, ..Policy::default() });
            world.happen(definition("/a", Some(100), 1));
            let first = world.place(0);
            world.measured(0, first, size("a", 300));
            world.happen(Event::Scale(2));
            world.place(1);
            let ordered = world.effects.iter().find_map(|effect| match effect {
                Effect::Register { measured, .. } => Some(*measured),
                _ => None,
            });
            assert_eq!(ordered, Some(expected), "{trust:?}");
        }
    }

    #[test]
    fn a_size_outlives_a_restart_and_a_rollback_and_not_its_last_version() {
        let mut world = World::new(Policy { history: 2, ..Policy::default() });
        world.happen(definition("/a", None, 1));
        let row = match world.model.row() {
            Write::PutModel(row) => *row,
            other => panic!("{other:?}"),
        };
        let copy = world.place(0);
        world.measured(0, copy, size("a", 300));
        let sizes: Vec<SizeRow> = world
            .writes
            .iter()
            .filter_map(|write| if let Write::PutSize(row) = write { Some(row.as_ref().clone()) } else { None })
            .collect();
        let versions = match world.model.version_row(Version(1)) {
            Some(Write::PutVersion(row)) => vec![*row],
            other => panic!("{other:?}"),
        };
        let restored = restore(row, versions, Vec::new(), NOW).with_sizes(sizes);
        assert_eq!(restored.measured_version(Version(1)), Some(Resources::primary(Bytes(300))));

        world.happen(definition("/b", None, 1));
        world.happen(Event::Rollback(None));
        let needs: Vec<u64> = world.model.copies.iter().map(|copy| copy.need.primary.0).collect();
        assert_eq!(world.model.latest().map(|entry| entry.version), Some(Version(3)));
        assert_eq!(world.model.measured_version(Version(3)), Some(Resources::primary(Bytes(300))), "{needs:?}");
        // Nothing is of the artifact any more.
        world.happen(Event::Scale(0));
        for uri in ["/c", "/d", "/e"] {
            world.happen(definition(uri, None, 0));
        }
        for copy in world.model.copies.clone() {
            if let Some(on) = copy.state.replica().cloned() {
                world.happen(Event::Replica(on, copy::Event::ReplicaLost));
            }
        }
        world.happen(definition("/f", None, 0));
        assert!(world.model.sizes.measured.is_empty(), "{:?}", world.model.sizes);
    }

    #[test]
    fn a_guess_outlives_its_copy_and_the_largest_counts_for_the_next() {
        let mut world = World::new(Policy::default());
        world.happen(definition("/a", None, 1));
        let first = world.place(0);
        world.report(0, first, Report::Loading { estimate: Some(Box::new(size("a", 900 << 20))) });
        world.happen(Event::Displaced(BTreeSet::from([first])));
        world.report(0, first, Report::Unloaded);
        let waits = world.model.copies.iter().find(|copy| copy.state.replica().is_none()).expect("another one waits");
        assert_eq!(waits.need, Resources::primary(Bytes(900 << 20)));
        // A smaller replica guesses less, since a guess is never more than it has.
        let second = world.place(1);
        world.report(1, second, Report::Loading { estimate: Some(Box::new(size("a", 500 << 20))) });
        assert_eq!(world.need(second), 500 << 20);
        world.happen(Event::Scale(2));
        let third = world.place(2);
        assert_eq!(world.need(third), 900 << 20);
    }

    #[test]
    fn a_guess_whose_first_word_was_lost_is_heard_with_the_next() {
        let mut world = World::new(Policy::default());
        world.happen(definition("/a", None, 1));
        let copy = world.place(0);
        let estimate = Some(Box::new(size("a", 900 << 20)));
        world.report(
            0,
            copy,
            Report::Available { residency: Residency::Resident, measured: None, estimate, pinned: false },
        );
        assert_eq!(world.need(copy), 900 << 20);
        assert!(world.effects.contains(&Effect::Keep(copy)), "the ledger has to follow: {:?}", world.effects);
    }

    /// A model that says nothing of its memory, on replicas that others fill in part.
    struct Fleet {
        world: World,
        placement: Placement,
        capacities: Vec<u64>,
        guess: u64,
        loads: usize,
        mail: VecDeque<Event>,
    }

    impl Fleet {
        fn new(replicas: &[(u64, u64)], guess: u64) -> Self {
            let mut placement = Placement::default();
            for (index, (capacity, taken)) in (0..).zip(replicas) {
                let facts = ReplicaFacts {
                    reported: Some(Resources::primary(Bytes(*capacity))),
                    state: ReplicaState::Available,
                    ..ReplicaFacts::default()
                };
                placement.upsert_replica(&on(index), facts);
                if *taken > 0 {
                    let other = ModelName::new(&format!("other{index}")).expect("valid");
                    let copy = Generation { uid: Uid(0), version: Version(1), number: index };
                    let need = Resources::primary(Bytes(*taken));
                    placement.restore(&other, copy, &on(index), need).expect("registered nowhere else");
                }
            }
            let world = World::new(Policy { default_memory: DEFAULT, ..Policy::default() });
            let capacities = replicas.iter().map(|(capacity, _)| *capacity).collect();
            Self { world, placement, capacities, guess, loads: 0, mail: VecDeque::new() }
        }

        fn request(&self, wanted: &Wanted) -> PlacementRequest {
            let name = self.world.model.name.clone();
            let request = PlacementRequest::new(name, wanted.generation, wanted.need.clone());
            PlacementRequest { spread: wanted.spread, together: wanted.together, ..request }
        }

        fn answer(&mut self, generation: Generation, outcome: Result<Placed, Unplaced>) {
            let event = match outcome {
                Ok(placed) => copy::Event::Placed { on: placed.replica },
                Err(reason) => copy::Event::Unplaced { reason },
            };
            self.mail.push_back(Event::Copy(generation, event));
        }

        fn perform(&mut self, effect: Effect) {
            let name = self.world.model.name.clone();
            match effect {
                Effect::Place(wanted) => {
                    let outcome = self.placement.place(&self.request(&wanted), NOW).outcome;
                    self.answer(wanted.generation, outcome);
                }
                Effect::Withdraw(generation) | Effect::Release(generation) => {
                    self.placement.release(&name, generation);
                }
                Effect::Keep(generation) => {
                    let kept = self.world.model.copies.iter().find(|copy| copy.generation == generation).expect("kept");
                    let (on, need) = (kept.state.replica().expect("placed"), kept.need.clone());
                    self.placement.restore(&name, generation, on, need).expect("registered nowhere else");
                }
                Effect::Leave(generation) => self.placement.mark_leaving(&name, generation).expect("registered"),
                Effect::Register { on, generation, .. } => {
                    self.loads += 1;
                    // What an agent guesses is never more than its replica has.
                    let capacity = self.capacities[usize::try_from(on.index).expect("few")];
                    let estimate = Some(Box::new(size("a", self.guess.min(capacity))));
                    self.mail.push_back(Event::Reported(on, generation, Some(Report::Loading { estimate })));
                }
                Effect::Unregister { on, generation } => {
                    self.mail.push_back(Event::Reported(on, generation, Some(Report::Unloaded)));
                }
                Effect::Publish(revision) => self.mail.push_back(Event::RoutesSettled(revision)),
                Effect::Wake(_) | Effect::Note(_) | Effect::Arrived(_) | Effect::Terminated => {}
            }
        }

        /// What the placement does by itself: looks at what does not fit, and offers what came free.
        fn tend(&mut self) {
            for index in 0..self.capacities.len() {
                let id = on(u32::try_from(index).expect("few"));
                let name = &self.world.model.name;
                let request = |copy: &copy::Copy| {
                    let wanted = self.world.model.wanted(copy)?;
                    Some(((name.clone(), copy.generation), self.request(&wanted)))
                };
                let requests = self.world.model.copies.iter().filter_map(request).collect();
                self.placement.relieve(&id, &requests, NOW);
            }
            let copies = self.placement.ledger().copies_of(&self.world.model.name);
            let displaced: BTreeSet<Generation> =
                copies.filter(|(_, copy)| copy.displaced).map(|(generation, _)| *generation).collect();
            if *self.world.model.displaced() != displaced {
                self.mail.push_back(Event::Displaced(displaced));
            }
            for (_, generation, decision) in self.placement.retry(NOW, 1000).decisions {
                self.answer(generation, decision.outcome);
            }
        }

        /// Whether nothing happens any more, after so many events.
        fn settles(&mut self, events: usize) -> bool {
            for _ in 0..events {
                if self.mail.is_empty() {
                    self.tend();
                }
                let Some(event) = self.mail.pop_front() else { return true };
                self.world.happen(event);
                for effect in std::mem::take(&mut self.world.effects) {
                    self.perform(effect);
                }
            }
            false
        }
    }

    #[test]
    fn a_guess_that_no_replica_has_room_for_is_tried_once_and_waits_with_its_reason() {
        // Room for the default, and not for the guess.
        let mut fleet = Fleet::new(&[(1000, 500), (1000, 600)], 700);
        fleet.mail.push_back(definition("/a", None, 1));
        assert!(fleet.settles(200), "{} loads and no end", fleet.loads);
        assert_eq!(fleet.loads, 1);
        let [copy] = fleet.world.model.copies.as_slice() else { panic!("{:?}", fleet.world.model.copies) };
        let State::Pending { reason: Some(reason) } = &copy.state else { panic!("{copy:?}") };
        assert_eq!(copy.need, Resources::primary(Bytes(700)));
        assert!(reason.summary().contains("lacks at least 200 B"), "{}", reason.summary());
    }

    proptest! {
        #[test]
        fn guesses_move_no_copy_for_ever(
            replicas in proptest::collection::vec((300..1200_u64, 0..100_u64), 1..4),
            guess in 100..1500_u64,
            wanted in 1..4_u32,
        ) {
            let replicas: Vec<_> =
                replicas.into_iter().map(|(capacity, percent)| (capacity, capacity * percent / 100)).collect();
            let mut fleet = Fleet::new(&replicas, guess);
            fleet.mail.push_back(definition("/a", None, wanted));
            prop_assert!(fleet.settles(400), "{} loads and no end", fleet.loads);
            prop_assert!(fleet.loads <= 3 * usize::try_from(wanted).expect("few"), "{} loads", fleet.loads);
        }
    }
}
