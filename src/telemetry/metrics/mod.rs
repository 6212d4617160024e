//! Metrics, in the words of `OpenMetrics`. Names follow Seldon's where the meaning is the same; the others are
//! `wharf_<noun>_<unit>`, with `_total` where they only grow.

mod data;
mod labels;
mod scheduler;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge, histogram::Histogram},
    registry::Registry,
};

pub use data::{AgentMetrics, GatewayMetrics, MAX_MODEL_SERIES};
pub use labels::{ActorEvent, Code, Commit, Name, Placement, Protocol, Submission};
pub use scheduler::SchedulerMetrics;

/// What a process does, and so what it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It schedules.
    Scheduler,
    /// It routes requests.
    Gateway,
    /// It stands beside an inference server.
    Agent,
}

/// Everything that a process counts.
#[derive(Debug)]
pub struct Metrics {
    /// The scheduler's.
    pub scheduler: SchedulerMetrics,
    /// The gateway's.
    pub gateway: GatewayMetrics,
    /// The agents'.
    pub agent: AgentMetrics,
    registry: Registry,
    scraped: Scraped,
}

/// A number that a part of the process keeps by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its name as exported.
    pub name: &'static str,
    /// What it means.
    pub help: &'static str,
    /// Its labels.
    pub labels: Vec<(&'static str, String)>,
    /// The number.
    pub value: u64,
    /// Whether it only grows.
    pub grows: bool,
}

/// Reads what a part of the process keeps. Called for every scrape: it must not wait.
pub type Read = Box<dyn Fn() -> Vec<Sample> + Send + Sync>;

impl Metrics {
    /// The metrics of a process in these roles. Of the groups of other roles nothing is exported. `per_model`
    /// counts requests by model too, for [`MAX_MODEL_SERIES`] models at most.
    #[must_use]
    pub fn new(roles: &[Role], per_model: bool) -> Self {
        let (scheduler, gateway, agent) =
            (SchedulerMetrics::new(), GatewayMetrics::new(), AgentMetrics::new(per_model));
        let mut registry = Registry::default();
        if roles.contains(&Role::Scheduler) {
            scheduler.register(&mut registry);
        }
        if roles.contains(&Role::Gateway) {
            gateway.register(&mut registry);
        }
        if roles.contains(&Role::Agent) {
            agent.register(&mut registry);
        }
        let scraped = Scraped::default();
        registry.register_collector(Box::new(scraped.clone()));
        Self { scheduler, gateway, agent, registry, scraped }
    }

    /// Exports what `read` finds from now on. Samples of one name, from several parts, become one metric.
    pub fn expose(&self, read: Read) {
        self.scraped.0.lock().unwrap_or_else(PoisonError::into_inner).push(read);
    }

    /// Everything, as `OpenMetrics` text.
    ///
    /// # Errors
    /// When something can't be written down, which is a fault of Wharf's own.
    pub fn exposition(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

#[derive(Clone, Default)]
struct Scraped(Arc<Mutex<Vec<Read>>>);

impl fmt::Debug for Scraped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scraped").finish_non_exhaustive()
    }
}

impl Collector for Scraped {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut by_name: BTreeMap<&'static str, Vec<Sample>> = BTreeMap::new();
        for read in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for sample in read() {
                by_name.entry(sample.name).or_default().push(sample);
            }
        }
        for (name, samples) in by_name {
            let Some(first) = samples.first() else { continue };
            // OpenMetrics lets a counter's name end in nothing but _total. Seldon has some that do not: they keep
            // their names, and are of no stated type.
            let (name, kind) = match name.strip_suffix("_total") {
                Some(name) if first.grows => (name, MetricType::Counter),
                _ if first.grows => (name, MetricType::Unknown),
                _ => (name, MetricType::Gauge),
            };
            let counts = matches!(kind, MetricType::Counter);
            let mut metric = encoder.encode_descriptor(name, first.help, None, kind)?;
            for sample in &samples {
                let labelled = metric.encode_family(&sample.labels)?;
                if counts {
                    ConstCounter::new(sample.value).encode(labelled)?;
                } else {
                    ConstGauge::new(i64::try_from(sample.value).unwrap_or(i64::MAX)).encode(labelled)?;
                }
            }
        }
        Ok(())
    }
}

/// What a histogram of seconds measures.
#[derive(Clone, Copy, Debug)]
enum Bucketed {
    /// A decision in memory: 1 us to 16 ms.
    Decision,
    /// A request: 100 us to 100 s.
    Request,
    /// Writing to a disk: 100 us to 6 s.
    Disk,
    /// Loading or downloading a model: 1 ms to 18 min.
    Load,
}

fn buckets(of: Bucketed) -> Histogram {
    let (start, factor, count) = match of {
        Bucketed::Decision => (1e-6, 4.0, 8),
        Bucketed::Request => (1e-4, 2.0, 21),
        Bucketed::Disk => (1e-4, 3.0, 11),
        Bucketed::Load => (1e-3, 4.0, 11),
    };
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(start, factor, count))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::{
        names::{ModelName, ReplicaId, ServerName},
        version::Version,
    };

    fn lines(metrics: &Metrics) -> Vec<String> {
        metrics.exposition().unwrap().lines().map(str::to_owned).collect()
    }

    fn replica(index: u32) -> ReplicaId {
        ReplicaId::new(ServerName::new("mlserver").unwrap(), index)
    }

    /// What every exposition must be: one description per name, every sample below its own, no series twice.
    fn check(lines: &[String]) {
        let mut described = std::collections::BTreeSet::new();
        let mut series = std::collections::BTreeSet::new();
        let mut current = String::new();
        for line in lines {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                current = rest.split(' ').next().unwrap().to_owned();
                assert!(described.insert(current.clone()), "{current} is described twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&current), "{line} below {current}");
                assert!(series.insert(line.rsplit_once(' ').unwrap().0.to_owned()), "{line} is there twice");
            }
        }
        assert_eq!(lines.last().map(String::as_str), Some("# EOF"));
    }

    #[test]
    fn what_is_counted_is_exported_under_its_name_and_only_for_the_role() {
        let metrics = Metrics::new(&[Role::Scheduler], false);
        metrics.scheduler.commit(Commit::Committed, 7, Duration::from_millis(4));
        metrics.scheduler.commit(Commit::Failed, 9, Duration::from_millis(4));
        metrics.scheduler.actor(Name("model"), ActorEvent::Panicked);
        metrics.agent.reload(&replica(0), Duration::from_millis(1));
        let lines = lines(&metrics);
        check(&lines);
        for line in [
            "wharf_journal_commits_total{outcome=\"committed\"} 1",
            "wharf_journal_commits_total{outcome=\"unknown\"} 0",
            "wharf_submissions_total{outcome=\"refused\"} 0",
            "wharf_journal_rows_total 7",
            "wharf_actor_events_total{actor=\"model\",event=\"panicked\"} 1",
        ] {
            assert!(lines.iter().any(|found| found == line), "{line} in {lines:#?}");
        }
        assert!(!lines.iter().any(|line| line.contains("reload") || line.contains("gateway_request")), "{lines:#?}");
    }

    #[test]
    fn agents_of_one_process_share_their_metrics() {
        let metrics = Metrics::new(&[Role::Agent, Role::Gateway], true);
        let model = ModelName::new("iris").unwrap();
        for index in 0..2 {
            let spent = Duration::from_millis(2);
            metrics.agent.infer(&replica(index), &model, Version(2), Protocol::Rest, Code::new(200), spent);
        }
        metrics.gateway.request_seconds(Protocol::Grpc).observe(0.1);
        let lines = lines(&metrics);
        check(&lines);
        let of_one = "server=\"mlserver\",server_replica=\"1\"";
        for line in [
            format!(
                "seldon_model_infer_total{{{of_one},model=\"iris\",model_internal=\"iris_2\",method_type=\"rest\",code=\"200\"}} 1"
            ),
            format!("seldon_model_infer_api_seconds_count{{{of_one},method=\"rest\",code=\"200\"}} 1"),
        ] {
            assert!(lines.contains(&line), "{line} in {lines:#?}");
        }
    }

    #[test]
    fn models_make_no_more_series_than_there_may_be() {
        let metrics = Metrics::new(&[Role::Agent], true);
        for n in 0..MAX_MODEL_SERIES + 50 {
            let model = ModelName::new(&format!("m{n}")).unwrap();
            let code = Code::new(u16::try_from(n % 50_000).unwrap() | 0x8000);
            metrics.agent.infer(&replica(0), &model, Version(1), Protocol::Grpc, code, Duration::ZERO);
        }
        let lines = lines(&metrics);
        let series = lines.iter().filter(|line| line.starts_with("seldon_model_infer_total{")).count();
        assert_eq!(series, MAX_MODEL_SERIES + 1);
        assert!(lines.iter().any(|line| line.contains("model=\"other\"") && line.ends_with(" 50")));
    }

    #[test]
    fn what_parts_keep_by_themselves_is_read_when_asked_for() {
        let metrics = Metrics::new(&[Role::Agent], false);
        let sample = |name, grows, index: u32, value| Sample {
            name,
            help: "Something",
            labels: vec![("server_replica", index.to_string())],
            value,
            grows,
        };
        for index in 0..2 {
            metrics.expose(Box::new(move || {
                vec![
                    sample("seldon_cache_evict_count", true, index, 5),
                    sample("wharf_door_not_here_total", true, index, 6),
                    sample("wharf_holds", false, index, 7),
                ]
            }));
        }
        let lines = lines(&metrics);
        check(&lines);
        for line in [
            "# TYPE seldon_cache_evict_count unknown",
            "seldon_cache_evict_count{server_replica=\"1\"} 5",
            "# TYPE wharf_door_not_here counter",
            "wharf_door_not_here_total{server_replica=\"0\"} 6",
            "# TYPE wharf_holds gauge",
            "wharf_holds{server_replica=\"1\"} 7",
        ] {
            assert!(lines.iter().any(|found| found == line), "{line} in {lines:#?}");
        }
    }
}
