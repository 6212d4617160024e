//! How an actor's end is noticed, however it ends.
//!
//! actix catches no panic and restarts nothing after one. But an actor's value is dropped while its thread
//! unwinds: a [`Life`] inside it tells the supervisor then, with the panic's message.

use std::{cell::RefCell, sync::Once, thread};

use actix::Recipient;

use super::journal::Fatal;
use crate::messages::supervisor::{Ended, Who};

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps the message of each panic for the [`Life`] that ends with it. The hook that was there still runs.
pub(super) fn remember_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let message = info.payload_as_str().unwrap_or("a panic without a message");
            let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
            LAST_PANIC.with(|last| *last.borrow_mut() = Some(format!("{message}{place}")));
            before(info);
        }));
    });
}

/// An actor's life: from its start to its drop.
#[derive(Debug)]
pub(super) struct Life {
    who: Who,
    supervisor: Recipient<Ended>,
}

impl Life {
    /// Begins here. The many of a restart are told in one line of their own.
    pub(super) fn begin(who: Who, supervisor: Recipient<Ended>, one_of_many: bool) -> Self {
        if one_of_many {
            tracing::debug!(target: "wharf::supervision", event = "actor_started", actor = %who, "actor started");
        } else {
            tracing::info!(target: "wharf::supervision", event = "actor_started", actor = %who, "actor started");
        }
        Self { who, supervisor }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.supervisor.do_send(Ended { who: self.who.clone(), panic: panic_now() });
    }
}

/// The message of the panic that this thread unwinds from, if it does.
fn panic_now() -> Option<String> {
    thread::panicking().then(|| {
        LAST_PANIC.with(|last| last.borrow_mut().take()).unwrap_or_else(|| "a panic without a message".to_owned())
    })
}

/// The supervisor's own life. Nobody watches it: without it nothing is started, found or made anew, so the process
/// exits.
pub(super) struct LastWords(Fatal);

impl LastWords {
    pub(super) const fn new(fatal: Fatal) -> Self {
        Self(fatal)
    }
}

impl Drop for LastWords {
    fn drop(&mut self) {
        if let Some(cause) = panic_now() {
            (self.0)(format!("the supervisor panicked ({cause})"));
        }
    }
}
