//! What a scheduler counts.

use std::time::Duration;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{
    Bucketed, buckets,
    labels::{ActorEvent, ByActor, ByOutcome, Commit, Name, Placement, Submission},
};

/// A scheduler's metrics. Each is there from the start, at zero.
#[derive(Debug)]
pub struct SchedulerMetrics {
    submissions: Family<ByOutcome<Submission>, Counter>,
    commits: Family<ByOutcome<Commit>, Counter>,
    commit_seconds: Histogram,
    rows: Counter,
    placements: Family<ByOutcome<Placement>, Counter>,
    placement_seconds: Histogram,
    available_seconds: Histogram,
    actor_events: Family<ByActor, Counter>,
    /// The newest route epoch.
    pub route_epoch: Gauge,
    /// The oldest epoch that a gateway with a lease has acknowledged.
    pub acknowledged_epoch: Gauge,
    /// Gateways with a lease.
    pub gateways: Gauge,
    /// Ledgers that were not what their parts add up to.
    pub inconsistencies: Counter,
}

impl SchedulerMetrics {
    pub(super) fn new() -> Self {
        let metrics = Self {
            submissions: Family::default(),
            commits: Family::default(),
            commit_seconds: buckets(Bucketed::Disk),
            rows: Counter::default(),
            placements: Family::default(),
            placement_seconds: buckets(Bucketed::Decision),
            available_seconds: buckets(Bucketed::Load),
            actor_events: Family::default(),
            route_epoch: Gauge::default(),
            acknowledged_epoch: Gauge::default(),
            gateways: Gauge::default(),
            inconsistencies: Counter::default(),
        };
        for outcome in Submission::ALL {
            drop(metrics.submissions.get_or_create(&ByOutcome { outcome: *outcome }));
        }
        for outcome in Commit::ALL {
            drop(metrics.commits.get_or_create(&ByOutcome { outcome: *outcome }));
        }
        for outcome in Placement::ALL {
            drop(metrics.placements.get_or_create(&ByOutcome { outcome: *outcome }));
        }
        metrics
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("wharf_submissions", "Submissions of models", self.submissions.clone());
        registry.register("wharf_journal_commits", "Commits of the journal", self.commits.clone());
        registry.register("wharf_journal_commit_seconds", "Duration of commits", self.commit_seconds.clone());
        registry.register("wharf_journal_rows", "Rows written to the journal", self.rows.clone());
        registry.register("wharf_placements", "Placement decisions", self.placements.clone());
        registry.register("wharf_placement_seconds", "Duration of placement decisions", self.placement_seconds.clone());
        registry.register(
            "wharf_available_seconds",
            "Time from a submission to its first available copy",
            self.available_seconds.clone(),
        );
        registry.register("wharf_route_epoch", "Newest route epoch", self.route_epoch.clone());
        registry.register(
            "wharf_route_acknowledged_epoch",
            "Oldest epoch that a gateway with a lease acknowledged",
            self.acknowledged_epoch.clone(),
        );
        registry.register("wharf_gateways", "Gateways with a lease", self.gateways.clone());
        registry.register("wharf_actor_events", "What happened to actors", self.actor_events.clone());
        registry.register("wharf_inconsistencies", "Ledgers that did not add up", self.inconsistencies.clone());
    }

    /// Counts a submission.
    pub fn submission(&self, outcome: Submission) {
        self.submissions.get_or_create(&ByOutcome { outcome }).inc();
    }

    /// Counts a commit of `rows` rows that took `duration`.
    pub fn commit(&self, outcome: Commit, rows: usize, duration: Duration) {
        self.commits.get_or_create(&ByOutcome { outcome }).inc();
        self.commit_seconds.observe(duration.as_secs_f64());
        if outcome == Commit::Committed {
            self.rows.inc_by(u64::try_from(rows).unwrap_or(u64::MAX));
        }
    }

    /// Counts a placement decision that took `duration`.
    pub fn placement(&self, outcome: Placement, duration: Duration) {
        self.placements.get_or_create(&ByOutcome { outcome }).inc();
        self.placement_seconds.observe(duration.as_secs_f64());
    }

    /// Counts a model's way from its submission to its first available copy.
    pub fn available(&self, duration: Duration) {
        self.available_seconds.observe(duration.as_secs_f64());
    }

    /// Counts what happened to an actor.
    pub fn actor(&self, actor: Name, event: ActorEvent) {
        self.actor_events.get_or_create(&ByActor { actor, event }).inc();
    }
}
