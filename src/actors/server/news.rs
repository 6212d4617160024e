//! What a server's models hear of it.
//!
//! The rule of this module: what agents report is gathered until nothing more is in the mailbox, so that copies of one
//! model that come to answer at once are one message, one decision and one route; and whatever else a model is told
//! is told after what was reported before it.

use std::{collections::BTreeMap, mem};

use actix::{AsyncContext as _, Context, Handler, Message};

use super::ServerActor;
use crate::{
    domain::{copy::Report, model::Event, names::ModelName, version::Generation},
    messages::model::{AllHappened, Happened},
};

/// Reports that are gathered at most, so that a flood of them does not keep the first from its model.
const GATHERED: usize = 1024;

/// What was reported and not yet told, model by model: the replica, the copy, and the word about it, oldest first.
#[derive(Default)]
pub(super) struct News {
    reports: BTreeMap<ModelName, Vec<(u32, Generation, Report)>>,
    count: usize,
}

#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct TellNews;

impl Handler<TellNews> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: TellNews, _: &mut Self::Context) {
        self.tell_news();
    }
}

impl ServerActor {
    /// Gathers what the agent of a replica says of a copy.
    pub(super) fn gather(
        &mut self,
        index: u32,
        model: ModelName,
        copy: Generation,
        report: Report,
        ctx: &mut Context<Self>,
    ) {
        if self.news.count == 0 {
            ctx.notify(TellNews);
        }
        self.news.reports.entry(model).or_default().push((index, copy, report));
        self.news.count += 1;
        if self.news.count >= GATHERED {
            self.tell_news();
        }
    }

    /// Tells models what was gathered. A copy of a model that has no actor is to go.
    pub(super) fn tell_news(&mut self) {
        for (model, reports) in mem::take(&mut self.news).reports {
            let copies: Vec<(u32, Generation)> = reports.iter().map(|(index, copy, _)| (*index, *copy)).collect();
            let event = |(index, copy, report)| Event::Reported(self.id(index), copy, Some(report));
            let happened = reports.into_iter().map(event).collect();
            if self.links.tell_model(&model, AllHappened(happened)) {
                continue;
            }
            for (index, copy) in copies {
                if let Some(replica) = self.replicas.get_mut(&index) {
                    replica.stray(model.clone(), copy, self.links.timing.drain);
                }
            }
        }
    }

    /// Tells a model what happened here, if it has an actor.
    pub(super) fn tell(&mut self, model: &ModelName, event: Event) -> bool {
        self.tell_news();
        self.links.tell_model(model, Happened(event))
    }
}
