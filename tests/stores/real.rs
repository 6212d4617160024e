//! The real rclone, installed by `tests/servers/setup.sh`, and its S3 server.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

/// The rclone program.
pub fn rclone() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        let setup = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/setup.sh");
        let out = Command::new("sh").arg(&setup).arg("rclone").stderr(Stdio::inherit()).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let program = text.lines().find_map(|line| line.strip_prefix("rclone=")).map(PathBuf::from);
        program
            .filter(|_| out.status.success())
            .unwrap_or_else(|| panic!("{} could not install rclone", setup.display()))
    };
    PROGRAM.get_or_init(find).clone()
}

/// An S3 server over a folder, whose folders are its buckets. It checks signatures.
pub struct S3 {
    process: Child,
    pub folder: tempfile::TempDir,
    pub address: String,
}

pub const KEY: &str = "ACCESSKEY1";
pub const SECRET: &str = "SECRETKEY1";

impl S3 {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(rclone());
        command.args(["serve", "s3", "--addr", "127.0.0.1:0", "--config", "/dev/null", "--vfs-cache-mode", "off"]);
        command.args(["--dir-cache-time", "0s", "--auth-key", &format!("{KEY},{SECRET}")]).arg(folder.path());
        command.env_remove("AWS_CA_BUNDLE").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let deadline = Instant::now() + Duration::from_secs(30);
        let address = loop {
            assert!(Instant::now() < deadline, "the S3 server does not come up");
            let line = lines.next().expect("the S3 server goes on").unwrap();
            if let Some((_, rest)) = line.split_once("[http://") {
                break rest.split('/').next().unwrap().to_owned();
            }
        };
        // It must not stop for a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, folder, address }
    }

    /// Puts a file into a bucket.
    pub fn put(&self, path: &str, content: &[u8]) {
        let path = self.folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// A secret for it at `address`, as Seldon's users write it.
    pub fn secret(address: &str, key: &str, secret: &str) -> String {
        format!(
            "type: s3\nname: minio\nparameters:\n  provider: Other\n  access_key_id: {key}\n  secret_access_key: {secret}\n  \
             endpoint: http://{address}\n  region: us-east-1\n  force_path_style: true\n"
        )
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
