//! The routes: one table, its epoch, and which gateway has acknowledged what.
//!
//! A route is settled once every gateway with a lease has acknowledged an epoch that has it. A gateway that
//! acknowledges nothing for its lease is waited for no longer; until one whole lease has passed since this
//! scheduler started, gateways of the one before it may still be there, and nothing is settled.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use actix::{Actor, AsyncContext as _, Context, Handler};
use serde_json::json;
use tokio::sync::mpsc;

use super::{life::Life, links::Links};
use crate::{
    domain::{
        model::Event,
        names::ModelName,
        routes::{Epoch, Route},
        time::Instant,
    },
    messages::{
        model::{Announce, Happened},
        router::{GatewayAcknowledged, GatewayConnected, GatewayGone, Publish, RouteUpdate},
        supervisor::Observe,
    },
};

/// Models in one epoch, at most: what a gateway reads at once.
pub(super) const CHANGES: usize = 1000;

pub(super) struct RouterActor {
    links: Arc<Links>,
    epoch: Epoch,
    /// Shared with the updates on their way to gateways.
    routes: BTreeMap<ModelName, Arc<Route>>,
    gateways: BTreeMap<String, Gateway>,
    /// Changed since the last epoch, with the models' own revisions.
    changed: BTreeMap<ModelName, u64>,
    /// Published and not yet acknowledged by all, oldest first.
    unreached: VecDeque<Published>,
    /// Acknowledged by all that are known, while gateways of an earlier scheduler may still come.
    unsettled: VecDeque<Published>,
    flushing: bool,
    /// Gateways of another journal, until its copies are adopted.
    foreign: BTreeMap<String, GatewayConnected>,
    /// Gateways of the router before this one are to have called again by then, or to have lost their lease.
    complete_from: Instant,
    _life: Life,
}

/// An epoch with the models that changed in it, each with its own revision.
type Published = (Epoch, Vec<(ModelName, u64)>);

struct Gateway {
    session: u64,
    updates: Option<mpsc::Sender<RouteUpdate>>,
    acknowledged: Epoch,
    heard: Instant,
}

impl RouterActor {
    pub(super) fn new(epoch: Epoch, links: Arc<Links>, life: Life) -> Self {
        let complete_from = links.clock.now() + links.timing.gateway_lease;
        Self {
            links,
            epoch,
            routes: BTreeMap::new(),
            gateways: BTreeMap::new(),
            changed: BTreeMap::new(),
            unreached: VecDeque::new(),
            unsettled: VecDeque::new(),
            flushing: false,
            foreign: BTreeMap::new(),
            complete_from,
            _life: life,
        }
    }

    /// Gives everything that changed since the last time an epoch, or several if it is much.
    fn flush(&mut self) {
        self.flushing = false;
        if self.changed.is_empty() {
            return;
        }
        while !self.changed.is_empty() {
            self.publish();
        }
        self.settle();
    }

    fn publish(&mut self) {
        self.epoch = Epoch(self.epoch.0 + 1);
        let rest = self.changed.keys().nth(CHANGES).cloned();
        let rest = rest.map(|first| self.changed.split_off(&first)).unwrap_or_default();
        let changed = std::mem::replace(&mut self.changed, rest);
        let routes = changed.keys().filter_map(|name| self.routes.get(name).cloned()).collect();
        let removed = changed.keys().filter(|name| !self.routes.contains_key(*name)).cloned().collect();
        self.send(&RouteUpdate::Changes(self.epoch, Arc::new((routes, removed))));
        self.unreached.push_back((self.epoch, changed.into_iter().collect()));
    }

    fn send(&mut self, update: &RouteUpdate) {
        for (name, gateway) in &mut self.gateways {
            if let Some(updates) = &gateway.updates
                && updates.try_send(update.clone()).is_err()
            {
                tracing::warn!(target: "wharf::router", gateway = %name, "a gateway does not read its routes; it is cut off and will connect again");
                gateway.updates = None;
            }
        }
    }

    fn settle(&mut self) {
        let now = self.links.clock.now();
        let lease = self.links.timing.gateway_lease;
        self.gateways.retain(|name, gateway| {
            let alive = now.since(gateway.heard) <= lease;
            if !alive {
                tracing::warn!(target: "wharf::router", gateway = %name, "a gateway's lease ran out; its routes are not waited for");
            }
            alive
        });
        let acknowledged = self.gateways.values().map(|gateway| gateway.acknowledged).min().unwrap_or(self.epoch);
        self.count(acknowledged);
        let alone = now >= self.links.unloads_from().max(self.complete_from);
        while let Some(published) = self.unreached.pop_front_if(|(epoch, _)| *epoch <= acknowledged) {
            if !alone {
                self.tell(&published, Event::RoutesReached);
            }
            self.unsettled.push_back(published);
        }
        if alone {
            while let Some(published) = self.unsettled.pop_front_if(|(epoch, _)| *epoch <= acknowledged) {
                self.tell(&published, Event::RoutesSettled);
            }
        }
    }

    fn tell(&self, (_, models): &Published, event: impl Fn(u64) -> Event) {
        for (model, revision) in models {
            self.links.tell_model(model, Happened(event(*revision)));
        }
    }

    fn count(&self, acknowledged: Epoch) {
        let counted = &self.links.metrics.scheduler;
        let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        counted.gateways.set(gauge(self.gateways.len() as u64));
        counted.route_epoch.set(gauge(self.epoch.0));
        counted.acknowledged_epoch.set(gauge(acknowledged.0));
    }
}

impl Actor for RouterActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // Before anyone is asked: an answer must not find the place empty.
        self.links.router.fill(ctx.address());
        // The whole table, before any gateway calls: a part of it would say that the other models are gone.
        for model in self.links.board.models() {
            if let Some(route) = model.published(|on| self.links.door(on), self.links.outlook()) {
                self.routes.insert(model.name.clone(), Arc::new(route));
            }
        }
        for model in self.links.all_models() {
            model.do_send(Announce::ToRouter);
        }
        ctx.run_interval(self.links.timing.gateway_lease / 4, |router, _| {
            router.send(&RouteUpdate::Ping(router.epoch));
            router.settle();
            if router.links.adopts_until().is_none_or(|until| router.links.clock.now() >= until) {
                for connected in std::mem::take(&mut router.foreign).into_values() {
                    router.follow(connected);
                }
            }
        });
    }
}

impl Handler<Publish> for RouterActor {
    type Result = ();

    fn handle(&mut self, publish: Publish, ctx: &mut Self::Context) {
        match publish.route {
            Some(route) => {
                self.routes.insert(publish.model.clone(), Arc::new(route));
            }
            None => {
                self.routes.remove(&publish.model);
            }
        }
        self.changed.insert(publish.model, publish.revision);
        if !self.flushing {
            // Whatever is in the mailbox by then shares the epoch.
            self.flushing = true;
            ctx.notify(Flush);
        }
    }
}

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Flush;

impl Handler<Flush> for RouterActor {
    type Result = ();

    fn handle(&mut self, _: Flush, _: &mut Self::Context) {
        self.flush();
    }
}

impl Handler<GatewayConnected> for RouterActor {
    type Result = ();

    fn handle(&mut self, connected: GatewayConnected, _: &mut Self::Context) {
        if connected.foreign {
            // What it holds is right until the copies of the other journal are adopted; the table here may lack some.
            self.links.adopt();
            if self.links.adopts_until().is_some_and(|until| self.links.clock.now() < until) {
                self.foreign.insert(connected.gateway.clone(), connected);
                return;
            }
        }
        self.follow(connected);
    }
}

impl RouterActor {
    fn follow(&mut self, connected: GatewayConnected) {
        self.flush();
        // It starts from the whole table, whatever it holds: one path to get right.
        let table = RouteUpdate::Table(self.epoch, self.routes.values().cloned().collect());
        let sent = connected.updates.try_send(table).is_ok();
        // What it holds is not what it has acknowledged: something may still be on its way under an older epoch.
        let acknowledged = Epoch::default();
        tracing::info!(target: "wharf::router", gateway = %connected.gateway, epoch = self.epoch.0, "a gateway follows the routes");
        let gateway = Gateway {
            session: connected.session,
            updates: sent.then_some(connected.updates),
            acknowledged,
            heard: self.links.clock.now(),
        };
        self.gateways.insert(connected.gateway, gateway);
    }
}

impl Handler<GatewayAcknowledged> for RouterActor {
    type Result = ();

    fn handle(&mut self, acknowledged: GatewayAcknowledged, _: &mut Self::Context) {
        let now = self.links.clock.now();
        if let Some(gateway) = self.gateways.get_mut(&acknowledged.gateway)
            && gateway.session == acknowledged.session
        {
            gateway.acknowledged = gateway.acknowledged.max(acknowledged.epoch.min(self.epoch));
            gateway.heard = now;
            self.settle();
        }
    }
}

impl Handler<GatewayGone> for RouterActor {
    type Result = ();

    fn handle(&mut self, gone: GatewayGone, _: &mut Self::Context) {
        if let Some(gateway) = self.gateways.get_mut(&gone.gateway)
            && gateway.session == gone.session
        {
            gateway.updates = None;
        }
    }
}

impl Handler<Observe> for RouterActor {
    type Result = ();

    fn handle(&mut self, round: Observe, _: &mut Self::Context) {
        let gateway = |(name, gateway): (&String, &Gateway)| {
            let state = json!({ "acknowledged": gateway.acknowledged.0, "connected": gateway.updates.is_some() });
            (name.clone(), state)
        };
        let state = json!({
            "epoch": self.epoch.0,
            "routes": self.routes.len(),
            "unreached": self.unreached.len(),
            "unsettled": self.unsettled.len(),
            "gateways": self.gateways.iter().map(gateway).collect::<BTreeMap<_, _>>(),
        });
        round.answer("router", state);
    }
}
