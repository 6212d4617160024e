//! Which models are loaded.
//!
//! Every load and unload takes a number when it begins, and one with a lower number never undoes what one with
//! a higher number did: a slow load does not bring back a model that was unloaded meanwhile. While a model is
//! loaded again, the plan that it has goes on serving.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use super::{
    failure::{Failure, Kind},
    plan::Plan,
};

/// A model that answers.
pub(super) const READY: &str = "READY";
/// A model that will answer.
const LOADING: &str = "LOADING";
/// A model that is on disk only.
const UNAVAILABLE: &str = "UNAVAILABLE";

/// All loaded models, and those on their way.
#[derive(Debug, Default)]
pub(super) struct Registry {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    last: u64,
    slots: BTreeMap<String, Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    plan: Option<Arc<Plan>>,
    /// How many loads are under way.
    loading: usize,
    /// The number of what made this slot what it is.
    settled: u64,
    /// Why the last load failed.
    failure: Option<String>,
}

/// What the index says of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) name: String,
    /// [`READY`], [`LOADING`] or [`UNAVAILABLE`].
    pub(super) state: &'static str,
    /// Why it is unavailable; empty when it is not.
    pub(super) reason: String,
}

impl Registry {
    /// The plan of model `name`.
    ///
    /// # Errors
    /// When it is not loaded, or not yet.
    pub(super) fn get(&self, name: &str) -> Result<Arc<Plan>, Failure> {
        let inner = self.read();
        let slot = inner.slots.get(name).ok_or_else(|| Failure::not_loaded(name))?;
        match &slot.plan {
            Some(plan) => Ok(Arc::clone(plan)),
            None if slot.loading > 0 => {
                Err(Failure::new(Kind::Loading, format!("model {name:?} is being loaded; try again shortly")))
            }
            None => Err(Failure::not_loaded(name)),
        }
    }

    /// Begins a load of model `name`.
    pub(super) fn begin(self: &Arc<Self>, name: &str) -> Loading {
        let mut inner = self.write();
        inner.last += 1;
        let number = inner.last;
        inner.slots.entry(name.to_owned()).or_default().loading += 1;
        Loading { registry: Arc::clone(self), name: name.to_owned(), number, done: false }
    }

    /// Lets go of model `name`. Requests that run on it go on; its memory is free when the last has ended.
    ///
    /// # Errors
    /// When there is nothing of it here.
    pub(super) fn unload(&self, name: &str) -> Result<(), Failure> {
        let plan = {
            let mut inner = self.write();
            inner.last += 1;
            let number = inner.last;
            let slot = inner.slots.get_mut(name).ok_or_else(|| Failure::not_loaded(name))?;
            slot.settled = number;
            slot.failure = None;
            let (plan, loading) = (slot.plan.take(), slot.loading > 0);
            if !loading {
                inner.slots.remove(name);
            }
            if plan.is_none() && !loading {
                return Err(Failure::not_loaded(name));
            }
            plan
        };
        // Freeing can take long: not under the lock.
        drop(plan);
        Ok(())
    }

    /// What is to be said of the models on disk, `names`, and of those that are loaded.
    pub(super) fn index(&self, names: Vec<String>) -> Vec<Listed> {
        let mut inner = self.write();
        // A failed load is remembered for as long as its folder is there.
        inner.slots.retain(|name, slot| slot.plan.is_some() || slot.loading > 0 || names.binary_search(name).is_ok());
        let mut listed: BTreeMap<String, (&'static str, String)> =
            names.into_iter().map(|name| (name, (UNAVAILABLE, "not loaded".to_owned()))).collect();
        for (name, slot) in &inner.slots {
            let entry = match slot {
                Slot { plan: Some(_), .. } => (READY, String::new()),
                Slot { loading: 1.., .. } => (LOADING, String::new()),
                Slot { failure, .. } => (UNAVAILABLE, failure.clone().unwrap_or_else(|| "not loaded".to_owned())),
            };
            listed.insert(name.clone(), entry);
        }
        listed.into_iter().map(|(name, (state, reason))| Listed { name, state, reason }).collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A load under way. Dropping it gives the load up.
#[derive(Debug)]
pub(super) struct Loading {
    registry: Arc<Registry>,
    name: String,
    number: u64,
    done: bool,
}

impl Loading {
    /// Ends the load: a plan serves from now on; a failure leaves what was loaded before.
    ///
    /// # Errors
    /// The failure; or that the model was unloaded meanwhile.
    pub(super) fn finish(mut self, outcome: Result<Plan, Failure>) -> Result<(), Failure> {
        self.done = true;
        let (result, replaced) = {
            let mut inner = self.registry.write();
            let slot = inner.slots.entry(self.name.clone()).or_default();
            slot.loading = slot.loading.saturating_sub(1);
            let overtaken = slot.settled > self.number;
            let (result, replaced) = match outcome {
                Ok(plan) if !overtaken => {
                    slot.settled = self.number;
                    slot.failure = None;
                    (Ok(()), slot.plan.replace(Arc::new(plan)))
                }
                // A later load is serving: it read the same folder, later.
                Ok(_) if slot.plan.is_some() => (Ok(()), None),
                Ok(_) => {
                    let message = format!("model {:?} was unloaded while it was being loaded", self.name);
                    (Err(Failure::new(Kind::Overtaken, message)), None)
                }
                Err(failure) => {
                    if !overtaken {
                        slot.settled = self.number;
                        slot.failure = Some(failure.message.clone());
                    }
                    (Err(failure), None)
                }
            };
            Self::tidy(&mut inner, &self.name);
            (result, replaced)
        };
        drop(replaced);
        result
    }

    /// Forgets a slot that says nothing.
    fn tidy(inner: &mut Inner, name: &str) {
        if inner.slots.get(name).is_some_and(|slot| slot.plan.is_none() && slot.loading == 0 && slot.failure.is_none())
        {
            inner.slots.remove(name);
        }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut inner = self.registry.write();
        if let Some(slot) = inner.slots.get_mut(&self.name) {
            slot.loading = slot.loading.saturating_sub(1);
        }
        Self::tidy(&mut inner, &self.name);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::runtime::{Onnx, execute::Queue};

    fn plan() -> Plan {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/add/model.onnx");
        Plan::load(&*Onnx::tract().engine, "add", &file, &Queue::default()).unwrap()
    }

    fn state(registry: &Registry) -> Vec<(String, &'static str)> {
        registry.index(Vec::new()).into_iter().map(|listed| (listed.name, listed.state)).collect()
    }

    #[test]
    fn a_load_does_not_bring_back_what_was_unloaded_meanwhile() {
        let registry = Arc::new(Registry::default());
        let slow = registry.begin("add");
        assert_eq!(registry.get("add").unwrap_err().kind, Kind::Loading);
        assert_eq!(state(&registry), [("add".to_owned(), "LOADING")]);
        registry.unload("add").unwrap();
        assert_eq!(slow.finish(Ok(plan())).unwrap_err().kind, Kind::Overtaken);
        assert_eq!(state(&registry), []);
        assert_eq!(registry.unload("add").unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn the_later_of_two_loads_wins_and_the_old_plan_serves_until_then() {
        let registry = Arc::new(Registry::default());
        registry.begin("add").finish(Ok(plan())).unwrap();
        let old = registry.get("add").unwrap();
        let (first, second) = (registry.begin("add"), registry.begin("add"));
        assert!(Arc::ptr_eq(&registry.get("add").unwrap(), &old));
        second.finish(Ok(plan())).unwrap();
        let new = registry.get("add").unwrap();
        assert!(!Arc::ptr_eq(&new, &old));
        first.finish(Ok(plan())).unwrap();
        assert!(Arc::ptr_eq(&registry.get("add").unwrap(), &new));
    }

    #[test]
    fn a_failed_or_abandoned_load_leaves_what_was_there() {
        let registry = Arc::new(Registry::default());
        drop(registry.begin("add"));
        assert_eq!(state(&registry), []);
        registry.begin("add").finish(Ok(plan())).unwrap();
        let broken = || Err(Failure::new(Kind::Artifact, "broken"));
        assert!(registry.begin("add").finish(broken()).is_err());
        drop(registry.begin("add"));
        assert_eq!(state(&registry), [("add".to_owned(), "READY")]);
        registry.unload("add").unwrap();
        assert!(registry.begin("add").finish(broken()).is_err());
        let listed = registry.index(vec!["add".to_owned()]);
        assert_eq!((listed[0].state, &*listed[0].reason), ("UNAVAILABLE", "broken"));
        // With its folder gone, nothing is left of it.
        assert_eq!(registry.index(Vec::new()), []);
        assert!(registry.read().slots.is_empty());
    }
}
