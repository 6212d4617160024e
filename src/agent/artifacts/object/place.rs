//! Object stores, by their URIs and by what secrets say of them. Nothing here asks a store.

use std::{collections::BTreeMap, sync::Arc};

use object_store::{
    ClientOptions, ObjectStore, RetryConfig,
    aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder,
    gcp::{GcpCredential, GoogleCloudStorageBuilder},
};

use super::super::{
    refusal::With,
    uri::{bad, redacted},
    web::{CONNECT, SILENCE},
};
use crate::domain::{
    copy::{Failure, FailureClass},
    secret::{Credentials, Secret},
};

/// The schemes of object stores. Users of other tools write some of them differently.
pub(super) const SCHEMES: [&str; 11] =
    ["s3", "s3a", "s3n", "gs", "gcs", "az", "azure", "abfs", "abfss", "wasb", "wasbs"];

/// What is asked of an object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    S3,
    Google,
    Azure,
}

/// Where an artifact is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kind: Kind,
    pub(super) bucket: String,
    /// Without slashes at its ends.
    pub(super) key: String,
    /// Whether only a folder can be meant.
    pub(super) folder: bool,
    /// Azure's account, when the URI names it.
    account: Option<String>,
}

impl Place {
    /// The place that `uri` names.
    pub(super) fn parse(uri: &str) -> Result<Self, Failure> {
        let shown = redacted(uri);
        let (scheme, rest) = uri.split_once("://").unwrap_or_default();
        let kind = match scheme.to_ascii_lowercase().as_str() {
            "s3" | "s3a" | "s3n" => Kind::S3,
            "gs" | "gcs" => Kind::Google,
            _ => Kind::Azure,
        };
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        // container@account.host
        let (bucket, account) = match (kind, bucket.split_once('@')) {
            (Kind::Azure, Some((container, host))) => (container, host.split('.').next()),
            _ => (bucket, None),
        };
        // Both become parts of the address that credentials are sent to.
        if !sound_bucket(bucket) {
            return Err(bad(format!("{shown} names no bucket; it is written {scheme}://BUCKET/PATH")));
        }
        if account.is_some_and(|account| !sound_account(account)) {
            return Err(bad(format!(
                "{shown} names no storage account: one has 3 to 24 small letters and digits; correct what is behind the @"
            )));
        }
        let account = account.map(ToOwned::to_owned);
        let key = path.trim_matches('/').to_owned();
        let folder = key.is_empty() || path.ends_with('/');
        Ok(Self { kind, bucket: bucket.to_owned(), key, folder, account })
    }
}

/// Whether a bucket or container can have this name. Old ones have more in theirs than new ones may.
fn sound_bucket(name: &str) -> bool {
    const LONGEST: usize = 255;
    let within = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let plain = name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.bytes().all(within);
    // Azure has these of its own.
    (plain && name.len() <= LONGEST) || matches!(name, "$root" | "$web" | "$logs")
}

/// Whether a storage account of Azure's can have this name.
fn sound_account(name: &str) -> bool {
    (3..=24).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// A store, ready to be asked.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) with: With,
    /// Its address, when that is not the provider's.
    pub(super) at: Option<String>,
}

/// The store of `place`, with what `credentials` say; without them with what `environment` has, and in the end with
/// what the machine has.
pub(super) fn open(
    place: &Place,
    credentials: Option<&Credentials>,
    environment: &BTreeMap<String, Secret>,
) -> Result<Opened, Failure> {
    let settled = settle(place, credentials, environment)?;
    let (retry, client) = (never(), client(settled.endpoint()));
    let at = settled.endpoint().map(redacted);
    let store: Result<Arc<dyn ObjectStore>, _> = match place.kind {
        Kind::S3 => {
            let mut builder = AmazonS3Builder::new().with_client_options(client);
            for (key, value) in settled.each() {
                builder = builder.with_config(key.parse().map_err(|_| unknown(place))?, value);
            }
            builder.with_retry(retry).with_bucket_name(&place.bucket).build().map(|store| Arc::new(store) as _)
        }
        Kind::Google => {
            let mut builder = GoogleCloudStorageBuilder::new().with_client_options(client);
            for (key, value) in settled.each() {
                builder =
                    match key {
                        "google_access_token" => builder.with_credentials(Arc::new(
                            object_store::StaticCredentialProvider::new(GcpCredential { bearer: value.to_owned() }),
                        )),
                        key => builder.with_config(key.parse().map_err(|_| unknown(place))?, value),
                    };
            }
            builder.with_retry(retry).with_bucket_name(&place.bucket).build().map(|store| Arc::new(store) as _)
        }
        Kind::Azure => {
            let mut builder = MicrosoftAzureBuilder::new().with_client_options(client);
            for (key, value) in settled.each() {
                builder = builder.with_config(key.parse().map_err(|_| unknown(place))?, value);
            }
            builder.with_retry(retry).with_container_name(&place.bucket).build().map(|store| Arc::new(store) as _)
        }
    };
    let with = match credentials {
        Some(credentials) => With::Secret(credentials.clone()),
        None if settled.anonymous => With::Nothing,
        None => {
            With::Own(settled.options.into_iter().filter(|(name, _)| opens(name)).map(|(_, value)| value).collect())
        }
    };
    let store = store.map_err(|error| {
        let why = super::super::refusal::deepest(&error).unwrap_or_else(|| error.to_string());
        let message = format!("the store of bucket {} can't be used: {}", place.bucket, with.scrubbed(&why));
        Failure { class: FailureClass::Authorisation, message }
    })?;
    Ok(Opened { store, with, at })
}

/// Whether the value of a setting opens something, and may not be seen.
fn opens(name: &str) -> bool {
    ["key", "token", "secret", "sas", "password"].iter().any(|word| name.contains(word))
}

fn unknown(place: &Place) -> Failure {
    bad(format!("a setting for the store of bucket {} is not one", place.bucket))
}

/// The transfer itself tries again, from where it was.
fn never() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn client(endpoint: Option<&str>) -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(CONNECT)
        .with_read_timeout(SILENCE)
        // A download takes as long as it takes; silence ends it.
        .with_timeout_disabled()
        .with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
}

/// What a store is opened with, in the names of the environment, in lower case.
#[derive(Debug, Default, PartialEq, Eq)]
struct Settled {
    options: BTreeMap<String, Secret>,
    anonymous: bool,
}

impl Settled {
    fn each(&self) -> impl Iterator<Item = (&str, &str)> {
        self.options.iter().map(|(key, value)| (key.as_str(), value.expose()))
    }

    fn endpoint(&self) -> Option<&str> {
        let keys = [
            "aws_endpoint_url_s3",
            "aws_endpoint_url",
            "aws_endpoint",
            "google_base_url",
            "azure_storage_endpoint",
            "azure_endpoint",
        ];
        keys.iter().find_map(|key| self.options.get(*key)).map(Secret::expose)
    }

    fn set(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.options.insert(key.to_owned(), Secret::new(value));
        }
    }
}

fn settle(
    place: &Place,
    credentials: Option<&Credentials>,
    environment: &BTreeMap<String, Secret>,
) -> Result<Settled, Failure> {
    let prefix = match place.kind {
        Kind::S3 => "aws_",
        Kind::Google => "google_",
        Kind::Azure => "azure_",
    };
    let known = |key: &str| match place.kind {
        Kind::S3 => key.parse::<object_store::aws::AmazonS3ConfigKey>().is_ok(),
        Kind::Google => key.parse::<object_store::gcp::GoogleConfigKey>().is_ok(),
        Kind::Azure => key.parse::<object_store::azure::AzureConfigKey>().is_ok(),
    };
    let own = environment
        .iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
        .filter(|(name, value)| name.starts_with(prefix) && known(name) && !value.expose().is_empty());
    let mut settled = Settled::default();
    let Some(secret) = credentials else {
        settled.options.extend(own);
        if place.kind == Kind::Azure {
            settled.set("azure_storage_account_name", place.account.as_deref());
        }
        settled.anonymous =
            settled.options.get(&format!("{prefix}skip_signature")).is_some_and(|yes| yes.expose() == "true");
        return Ok(settled);
    };
    check_kind(place, secret)?;
    if secret.flag(&["env_auth", "use_msi"]) == Some(true) {
        settled.options.extend(own);
    }
    match place.kind {
        Kind::S3 => settle_s3(&mut settled, secret),
        Kind::Google => settle_google(&mut settled, secret),
        Kind::Azure => settle_azure(&mut settled, secret, place)?,
    }
    Ok(settled)
}

/// A secret of another kind of store has nothing for this one.
fn check_kind(place: &Place, secret: &Credentials) -> Result<(), Failure> {
    let Some(kind) = secret.kind.as_deref() else { return Ok(()) };
    let (right, wanted) = match place.kind {
        Kind::S3 => (matches!(kind, "s3" | "minio"), "s3"),
        Kind::Google => (matches!(kind, "google cloud storage" | "gcs" | "gs"), "google cloud storage"),
        Kind::Azure => (matches!(kind, "azureblob" | "azure" | "az"), "azureblob"),
    };
    if right {
        return Ok(());
    }
    let message =
        format!("{} is for a store of type {kind}, and the URI needs one of type {wanted}; name another", secret.name);
    Err(Failure { class: FailureClass::Authorisation, message })
}

fn settle_s3(settled: &mut Settled, secret: &Credentials) {
    settled.set("aws_access_key_id", secret.get(&["access_key_id", "aws_access_key_id", "accesskey", "access_key"]));
    settled.set(
        "aws_secret_access_key",
        secret.get(&["secret_access_key", "aws_secret_access_key", "secretkey", "secret_key"]),
    );
    settled.set("aws_session_token", secret.get(&["session_token", "aws_session_token"]));
    settled.set("aws_region", secret.get(&["region", "aws_region", "aws_default_region", "default_region"]));
    let endpoint = secret.get(&["endpoint", "endpoint_url", "aws_endpoint_url", "aws_endpoint"]).map(with_scheme);
    settled.set("aws_endpoint", endpoint.as_deref());
    if secret.flag(&["force_path_style"]) == Some(false) || secret.flag(&["virtual_hosted_style_request"]) == Some(true)
    {
        settled.set("aws_virtual_hosted_style_request", Some("true"));
    }
    let keyless = ["aws_access_key_id", "aws_role_arn"].iter().all(|key| !settled.options.contains_key(*key));
    // As with rclone: no keys, and not told to look for any.
    if keyless && secret.flag(&["env_auth"]) != Some(true) {
        settled.set("aws_skip_signature", Some("true"));
    }
}

fn settle_google(settled: &mut Settled, secret: &Credentials) {
    let endpoint = secret.get(&["endpoint", "base_url", "google_base_url"]).map(with_scheme);
    settled.set("google_base_url", endpoint.as_deref());
    let key = [
        "service_account_credentials",
        "service_account_key",
        "google_service_account_key",
        "gcloud-application-credentials.json",
    ];
    settled.set("google_service_account_key", secret.get(&key));
    settled.set("google_service_account", secret.get(&["service_account_file", "service_account_path"]));
    settled.set("google_access_token", secret.get(&["access_token"]));
    let keys = [
        "google_service_account_key",
        "google_service_account",
        "google_access_token",
        "google_application_credentials",
    ];
    let keyless = keys.iter().all(|key| !settled.options.contains_key(*key));
    if secret.flag(&["anonymous"]) == Some(true) || (keyless && secret.flag(&["env_auth"]) != Some(true)) {
        settled.set("google_skip_signature", Some("true"));
    }
}

fn settle_azure(settled: &mut Settled, secret: &Credentials, place: &Place) -> Result<(), Failure> {
    let account = secret.get(&["account", "account_name", "azure_storage_account_name", "azure_storage_account"]);
    settled.set("azure_storage_account_name", account.or(place.account.as_deref()));
    settled.set(
        "azure_storage_account_key",
        secret.get(&["key", "account_key", "azure_storage_account_key", "azure_storage_access_key"]),
    );
    settled.set("azure_storage_sas_token", secret.get(&["sas_token", "sas_key", "azure_storage_sas_token"]));
    settled.set("azure_tenant_id", secret.get(&["tenant", "tenant_id", "azure_tenant_id", "az_tenant_id"]));
    settled.set("azure_client_id", secret.get(&["client_id", "azure_client_id", "az_client_id"]));
    settled.set("azure_client_secret", secret.get(&["client_secret", "azure_client_secret", "az_client_secret"]));
    let endpoint = secret.get(&["endpoint", "azure_storage_endpoint"]).map(with_scheme);
    settled.set("azure_storage_endpoint", endpoint.as_deref());
    if secret.flag(&["use_emulator"]) == Some(true) {
        settled.set("azure_storage_use_emulator", Some("true"));
    }
    if let Some(url) = secret.get(&["sas_url"]) {
        let url = reqwest::Url::parse(url).map_err(|_| bad(format!("sas_url of {} is not a URL", secret.name)))?;
        settled.set("azure_storage_sas_token", url.query());
        let host = url.host_str().unwrap_or_default();
        settled.set("azure_storage_account_name", host.split('.').next());
    }
    let keys =
        ["azure_storage_account_key", "azure_storage_sas_token", "azure_client_secret", "azure_federated_token_file"];
    let keyless = keys.iter().all(|key| !settled.options.contains_key(*key));
    if keyless && secret.flag(&["env_auth", "use_msi", "use_emulator"]) != Some(true) {
        settled.set("azure_skip_signature", Some("true"));
    }
    Ok(())
}

/// As rclone has it: an endpoint without a scheme is spoken to over TLS.
fn with_scheme(endpoint: &str) -> String {
    let endpoint = endpoint.trim_end_matches('/');
    if endpoint.contains("://") { endpoint.to_owned() } else { format!("https://{endpoint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(uri: &str) -> Place {
        Place::parse(uri).expect("a place")
    }

    fn secret(kind: Option<&str>, parameters: &[(&str, &str)]) -> Credentials {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(*value))).collect();
        Credentials { name: "secret \"s\"".to_owned(), remote: None, kind: kind.map(ToOwned::to_owned), parameters }
    }

    fn settled(uri: &str, secret: &Credentials) -> Vec<(String, String)> {
        let settled = settle(&place(uri), Some(secret), &BTreeMap::new()).expect("settled");
        settled.each().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn every_spelling_names_its_place() {
        for scheme in SCHEMES {
            let place = place(&format!("{scheme}://bucket/a/b/"));
            assert_eq!((place.bucket.as_str(), place.key.as_str(), place.folder), ("bucket", "a/b", true), "{scheme}");
        }
        let azure = place("abfss://models@account.dfs.core.windows.net/iris/m.onnx");
        assert_eq!((azure.bucket.as_str(), azure.account.as_deref()), ("models", Some("account")));
        assert_eq!((azure.key.as_str(), azure.folder), ("iris/m.onnx", false));
        assert!(place("s3://bucket").folder);
        for bad in ["s3://", "s3:///a", "s3://a@b/c", "gs://?x"] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(place("az://$web/a").bucket, "$web");
    }

    #[test]
    fn no_part_of_a_uri_names_another_host() {
        for bad in [
            "az://c@evil%2Ecom?/k",
            "az://c@/k",
            "az://c@Evil/k",
            "az://c@evil:8080/k",
            "az://c@x@y/k",
            "az://c%2F..%2F..@acc/k",
            "abfss://c@ac.dfs.core.windows.net/k",
            "s3://evil%2Ecom%2F/k",
            "s3://evil.com\\/k",
            "s3://../k",
            "gs://.b/k",
            "s3://b c/k",
            "az://$x/k",
        ] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_rclone_calls_it_is_understood() {
        let keys = [("access_key_id", "a"), ("secret_access_key", "b"), ("endpoint", "minio:9000/"), ("region", "eu")];
        let got = settled("s3://b/k", &secret(Some("s3"), &keys));
        let wanted = [
            ("aws_access_key_id", "a"),
            ("aws_endpoint", "https://minio:9000"),
            ("aws_region", "eu"),
            ("aws_secret_access_key", "b"),
        ];
        assert_eq!(got, wanted.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let google =
            settled("gs://b/k", &secret(Some("google cloud storage"), &[("service_account_credentials", "{}")]));
        assert_eq!(google, [("google_service_account_key".to_owned(), "{}".to_owned())]);
        let sas = [("sas_url", "https://acc.blob.core.windows.net/c?sv=1&sig=x")];
        let azure = settled("az://c/k", &secret(Some("azureblob"), &sas));
        let wanted = [("azure_storage_account_name", "acc"), ("azure_storage_sas_token", "sv=1&sig=x")];
        assert_eq!(azure, wanted.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_secret_without_keys_asks_as_nobody() {
        assert_eq!(settled("s3://b/k", &secret(None, &[])), [("aws_skip_signature".to_owned(), "true".to_owned())]);
        let other = settle(&place("s3://b/k"), Some(&secret(Some("azureblob"), &[])), &BTreeMap::new());
        assert!(other.expect_err("another kind").message.contains("azureblob"));
    }

    #[test]
    fn without_a_secret_the_environment_counts() {
        let environment = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_NOTHING", "x"), ("HOME", "/"), ("AWS_REGION", "")];
        let environment = environment.map(|(name, value)| (name.to_owned(), Secret::new(value))).into();
        let settled = settle(&place("s3://b/k"), None, &environment).expect("settled");
        assert_eq!(settled.each().collect::<Vec<_>>(), [("aws_access_key_id", "a")]);
        let anonymous = BTreeMap::from([("AWS_SKIP_SIGNATURE".to_owned(), Secret::new("true"))]);
        assert!(settle(&place("s3://b/k"), None, &anonymous).expect("settled").anonymous);
    }
}
