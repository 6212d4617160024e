//! Models and servers as tables.

use std::collections::BTreeMap;

use crate::{
    cli::{
        Context,
        output::Tone,
        table::{Cell, Table},
    },
    domain::memory::Bytes,
    rpc::{
        proto::wharf::{CopyView, ModelView, ReplicaView, Rollout, ServerView, VersionView, rollout},
        wire,
    },
};

/// The most replicas that a list names for one model.
const PLACES: usize = 3;

/// The newest version of a model.
pub(in crate::cli) fn newest(view: &ModelView) -> Option<&VersionView> {
    view.versions.iter().max_by_key(|version| version.version)
}

/// Bytes fetched by those copies that are being fetched, and bytes in all when every source tells.
pub(in crate::cli) fn copy_progress(copies: &[CopyView]) -> Option<(u64, Option<u64>)> {
    let mut downloading = copies.iter().filter(|copy| copy.state == "Downloading").peekable();
    downloading.peek()?;
    let start = (0_u64, Some(0_u64));
    Some(downloading.fold(start, |(done, total), copy| {
        let sum = total.zip(copy.total).map(|(total, more)| total.saturating_add(more));
        (done.saturating_add(copy.done), sum)
    }))
}

fn tone(state: &str) -> Tone {
    match state.strip_prefix("Model").unwrap_or(state) {
        "Available" => Tone::Good,
        "Failed" | "ScheduleFailed" | "TerminateFailed" | "Lost" => Tone::Bad,
        "Terminated" | "Unloaded" | "ScaledDown" => Tone::Dim,
        _ => Tone::Busy,
    }
}

fn state(state: &str) -> Cell {
    Cell::toned(state, tone(state))
}

/// How long ago something was: `12s`, `5m`, `3h`, `4d`; nothing when it is not told.
fn age(context: &Context, since: Option<prost_types::Timestamp>) -> Cell {
    let Some(then) = since.and_then(wire::instant) else { return Cell::from("") };
    let seconds = context.clock.now().since(then).as_secs();
    Cell::from(match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    })
}

/// One line per model: what Seldon's list shows first, then versions and places, the reason last.
pub(super) fn models(views: &BTreeMap<String, ModelView>) -> Table {
    let mut table = Table::new(&["model", "state", "version", "copies", "on", "reason"]);
    for view in views.values() {
        let version = match (view.serving, newest(view).map(|newest| newest.version)) {
            (Some(serving), Some(newest)) if serving != newest => format!("{serving} -> {newest}"),
            (_, Some(newest)) => newest.to_string(),
            (Some(serving), None) => serving.to_string(),
            (None, None) => String::new(),
        };
        table.row([
            Cell::from(&view.name),
            state(&view.state),
            Cell::from(version),
            Cell::from(format!("{}/{}", view.available, view.wanted)),
            Cell::from(places(view)),
            Cell::from(&view.reason),
        ]);
    }
    table
}

/// One line about a model that has come to the state it was waited for in.
pub(super) fn arrived(view: &ModelView) -> String {
    let version = newest(view).map_or_else(String::new, |newest| format!(", version {}", newest.version));
    let places = places(view);
    let on = if places.is_empty() { places } else { format!(" on {places}") };
    format!("{}: {}{version}{on}", view.name, view.state)
}

/// What to do about a failure, as far as its class tells.
pub(in crate::cli) fn next_step(reason: &str) -> &'static str {
    let class = reason.split(" failure:").next().unwrap_or_default();
    match class.rsplit(' ').next().unwrap_or_default() {
        "artifact" => "correct storageUri or what is there, and load it again",
        "authorisation" => "correct secretName or the secret, and load it again",
        "memory" => "declare the memory that it needs, and load it again",
        "incompatible" => "correct requirements or the model, and load it again",
        _ => "put it right and load it again",
    }
}

/// Where the copies of a model are, each replica once.
fn places(view: &ModelView) -> String {
    let mut places: Vec<String> = Vec::new();
    let copies = view.versions.iter().flat_map(|version| &version.copies);
    for copy in copies.filter(|copy| !copy.server.is_empty() && copy.state != "Unloaded") {
        let place = format!("{}-{}", copy.server, copy.replica);
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let more = places.len().saturating_sub(PLACES);
    places.truncate(PLACES);
    if more > 0 {
        places.push(format!("+{more}"));
    }
    places.join(",")
}

/// Everything about one model.
pub(super) fn model(context: &Context, view: &ModelView) -> Vec<String> {
    let output = &context.output;
    let clean = crate::cli::output::clean;
    let mut head = format!(
        "{}: {}, {} of {} copies answer",
        output.paint(Tone::Bold, &clean(&view.name)),
        output.paint(tone(&view.state), &clean(&view.state)),
        view.available,
        view.wanted
    );
    if let Some(serving) = view.serving.filter(|_| view.available > 0) {
        head.push_str(&format!(", clients are on version {serving}"));
    }
    let mut lines = vec![head];
    if !view.reason.is_empty() {
        lines.push(format!("reason: {}", clean(&view.reason)));
    }
    lines.extend(view.conditions.iter().map(|condition| format!("condition: {}", clean(condition))));
    if let Some(rollout) = &view.rollout {
        lines.push(format!("rollout: {}", rollout_line(rollout)));
    }
    let mut table = Table::new(&[
        "version", "state", "copy", "replica", "state", "memory", "declared", "measured", "since", "reason",
    ]);
    let mut versions: Vec<_> = view.versions.iter().collect();
    versions.sort_by_key(|version| std::cmp::Reverse(version.version));
    for version in versions {
        if version.copies.is_empty() {
            let nothing = || Cell::from("");
            table.row([
                Cell::from(version.version),
                state(&version.state),
                nothing(),
                nothing(),
                nothing(),
                nothing(),
                nothing(),
                nothing(),
                nothing(),
                Cell::from(&version.reason),
            ]);
        }
        for (n, copy) in version.copies.iter().enumerate() {
            let reason = if copy.reason.is_empty() && n == 0 { &version.reason } else { &copy.reason };
            let place =
                if copy.server.is_empty() { String::new() } else { format!("{}-{}", copy.server, copy.replica) };
            table.row([
                Cell::from(version.version),
                state(&version.state),
                Cell::from(copy.number),
                Cell::from(place),
                Cell::toned(&copy_state(copy), tone(&copy.state)),
                Cell::from(Bytes(copy.need)),
                bytes_or(copy.declared),
                bytes_or(copy.measured),
                age(context, copy.since),
                Cell::from(reason),
            ]);
        }
    }
    lines.push(String::new());
    lines.extend(table.lines(output));
    lines
}

fn bytes_or(bytes: Option<u64>) -> Cell {
    Cell::from(bytes.map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string()))
}

/// A copy's state, with how far it is or where its bytes are.
fn copy_state(copy: &CopyView) -> String {
    match (copy.state.as_str(), copy.total) {
        ("Downloading", Some(total)) if total > 0 => {
            let percent = u128::from(copy.done.min(total)) * 100 / u128::from(total);
            format!("Downloading {percent}%")
        }
        ("Downloading", _) => format!("Downloading {}", Bytes(copy.done)),
        ("Available", _) if !copy.residency.is_empty() && copy.residency != "Resident" => {
            format!("Available ({})", copy.residency.to_lowercase())
        }
        (state, _) => state.to_owned(),
    }
}

fn rollout_line(rollout: &Rollout) -> String {
    let mut line = match rollout.strategy() {
        rollout::Strategy::Recreate => "recreate".to_owned(),
        rollout::Strategy::RollingUpdate => {
            let strategy = wire::rolling_update(rollout.max_surge, rollout.max_unavailable);
            strategy.to_string()
        }
    };
    line.push_str(if rollout.spread_servers() { ", spread over servers" } else { ", on one server" });
    if rollout.priority() != 0 {
        line.push_str(&format!(", priority {}", rollout.priority()));
    }
    if rollout.pinned() {
        line.push_str(", pinned");
    }
    line
}

/// One line per server: what Seldon's list shows first.
pub(super) fn servers(views: &BTreeMap<String, ServerView>) -> Table {
    let mut table =
        Table::new(&["server", "replicas", "models", "registered", "capacity", "runtime", "owner", "conditions"]);
    for view in views.values() {
        let sum = |of: fn(&ReplicaView) -> u64| view.replicas.iter().map(of).fold(0_u64, u64::saturating_add);
        let available = view.replicas.iter().filter(|replica| replica.state == "Available").count();
        let mut conditions = view.conditions.clone();
        if view.removing {
            conditions.insert(0, "being removed".to_owned());
        }
        let expected = usize::try_from(view.expected).unwrap_or(usize::MAX).max(view.replicas.len());
        table.row([
            Cell::from(&view.name),
            Cell::toned(&format!("{available}/{expected}"), if available < expected { Tone::Busy } else { Tone::Good }),
            Cell::from(view.replicas.iter().map(|replica| u64::from(replica.copies)).sum::<u64>()),
            Cell::from(Bytes(sum(|replica| replica.registered))),
            Cell::from(Bytes(sum(|replica| replica.capacity))),
            Cell::from(&view.runtime),
            Cell::from(&view.owner),
            Cell::from(conditions.join("; ")),
        ]);
    }
    table
}

/// Everything about one server.
pub(super) fn server(context: &Context, view: &ServerView) -> Vec<String> {
    let output = &context.output;
    let clean = crate::cli::output::clean;
    let mut lines = vec![format!(
        "{}: {} replicas expected, owned by {}, capabilities {}",
        output.paint(Tone::Bold, &clean(&view.name)),
        view.expected,
        clean(&view.owner),
        if view.capabilities.is_empty() { "none".to_owned() } else { clean(&view.capabilities.join(", ")) }
    )];
    lines.extend(view.conditions.iter().map(|condition| format!("condition: {}", clean(condition))));
    let mut table = Table::new(&[
        "replica",
        "state",
        "copies",
        "resident",
        "registered",
        "in memory",
        "capacity",
        "since",
        "reason",
    ]);
    for replica in &view.replicas {
        let capacity = match replica.overcommit_percent {
            0 => Bytes(replica.capacity).to_string(),
            percent => format!("{} +{percent}%", Bytes(replica.capacity)),
        };
        table.row([
            Cell::from(replica.index),
            state(&replica.state),
            Cell::from(replica.copies),
            Cell::from(replica.copies_resident),
            Cell::from(Bytes(replica.registered)),
            Cell::from(Bytes(replica.resident)),
            Cell::from(capacity),
            age(context, replica.since),
            Cell::from(&replica.reason),
        ]);
    }
    lines.push(String::new());
    lines.extend(table.lines(output));
    lines
}
