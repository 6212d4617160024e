//! Where an agent's artifacts come from, by its settings and its environment.

use std::{path::PathBuf, sync::Arc};

use crate::{
    agent::{
        self, Blocking, RcloneUse,
        artifacts::{
            HttpSource, HubSource, LocalSource, ObjectSource, RcloneOptions, RcloneSource, SECRET_PREFIX, Secrets,
            Transfers,
        },
    },
    ports::{ArtifactSource, Clock},
    settings,
};

/// The environment that artifacts are fetched in.
#[derive(Clone, Default)]
pub struct Origins {
    environment: Vec<(String, String)>,
}

impl std::fmt::Debug for Origins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origins").finish_non_exhaustive()
    }
}

impl Origins {
    /// Origins with the variables of `environment`: secrets, and what the tools of object stores and hubs read.
    #[must_use]
    pub fn new(environment: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { environment: environment.into_iter().collect() }
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.environment.iter().find(|(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.clone())
    }

    /// The sources of one agent, whose `options` are told what belongs to them.
    ///
    /// # Errors
    /// When TLS can't be set up.
    pub fn ready(
        &self,
        settings: &settings::Agent,
        options: &mut agent::Options,
        clock: &Arc<dyn Clock>,
    ) -> Result<Vec<Arc<dyn ArtifactSource>>, String> {
        let named = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        options.keep_downloads = settings.keep_downloads;
        options.secrets = Secrets::new(named(&settings.secrets_dir), self.environment.iter().cloned());
        options.rclone = match settings.rclone {
            settings::RcloneUse::Always => RcloneUse::Always,
            settings::RcloneUse::Fallback => RcloneUse::Fallback,
            settings::RcloneUse::Never => RcloneUse::Never,
        };
        let (parallel, rate) = (settings.parallel_downloads as usize, settings.download_bandwidth.0);
        let transfers = Arc::new(Transfers::new(parallel, rate, Arc::clone(clock)));
        let http = HttpSource::new(Arc::clone(&transfers)).map_err(|failure| failure.message)?;
        let objects = ObjectSource::new(self.environment.iter().cloned(), Arc::clone(&transfers));
        let objects = objects.map_err(|failure| failure.message)?;
        // The hub's own tools read these; a setting that was made says more.
        let made = settings.hub != settings::Agent::default().hub;
        let hub = self.variable("HF_ENDPOINT").filter(|_| !made).unwrap_or_else(|| settings.hub.clone());
        let hub = HubSource::new(&hub, self.variable("HF_TOKEN"), Arc::clone(&transfers));
        let hub = hub.map_err(|failure| failure.message)?;
        let mut sources: Vec<Arc<dyn ArtifactSource>> =
            vec![Arc::new(LocalSource::new(None, Blocking::Pool)), Arc::new(http), Arc::new(objects), Arc::new(hub)];
        if options.rclone != RcloneUse::Never {
            let names = self.environment.iter().map(|(name, _)| name);
            let hidden = names.filter(|name| name.starts_with(SECRET_PREFIX) || *name == "HF_TOKEN");
            let rclone = RcloneOptions {
                program: settings.rclone_program.clone(),
                config: named(&settings.rclone_config),
                folder: options.data_dir.join("rclone"),
                hidden: hidden.cloned().collect(),
            };
            sources.push(Arc::new(RcloneSource::new(rclone, transfers)));
        }
        Ok(sources)
    }
}
