//! What the environment says of the hub and of caches.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// A token. It is sent to the hub and shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(pub(crate) String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// Where things are fetched from, and where they are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Who asks.
    pub token: Option<Token>,
    /// Whether nobody is asked, and the hub's cache has to do.
    pub offline: bool,
    /// The hub's cache, shared with all that use the hub.
    pub hub: PathBuf,
    /// Our own: files of the web, whole or in part, and lists of the files of repositories.
    pub own: PathBuf,
    /// How long is waited after a first failure; each further one doubles it.
    pub backoff: Duration,
}

impl Settings {
    /// As the libraries of Hugging Face read them: `HF_ENDPOINT`, `HF_TOKEN` (else the file `HF_TOKEN_PATH`, or `token` in
    /// `HF_HOME`), `HF_HUB_OFFLINE`, and `HF_HUB_CACHE` (else `hub` in `HF_HOME`). Our own cache is `pipeline` in
    /// `XDG_CACHE_HOME`, which is `~/.cache` unless it is set.
    pub fn from_env() -> Self {
        Settings::of(&|name| env::var_os(name))
    }

    fn of(variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &str| {
            variable(name).and_then(|value| value.into_string().ok()).filter(|text| !text.trim().is_empty())
        };
        let is_on = |name: &str| {
            text(name).is_some_and(|text| ["1", "ON", "YES", "TRUE"].contains(&text.to_ascii_uppercase().as_str()))
        };
        let caches =
            path("XDG_CACHE_HOME").unwrap_or_else(|| path("HOME").unwrap_or_else(|| "/".into()).join(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let from_file = || fs::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
        let token = text("HF_TOKEN").or_else(from_file).map(|token| token.trim().to_owned());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Settings {
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()).map(Token),
            offline: is_on("HF_HUB_OFFLINE"),
            hub: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
            own: caches.join("pipeline"),
            backoff: Duration::from_millis(500),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        Settings::of(&|name| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn caches_lie_where_others_look_for_them() {
        let folders = |variables: &[(&str, &str)]| {
            let Settings { hub, own, .. } = settings(variables);
            (hub.display().to_string(), own.display().to_string())
        };
        let expected = |hub: &str, own: &str| (hub.to_owned(), own.to_owned());
        let home = ("HOME", "/h");
        assert_eq!(folders(&[home]), expected("/h/.cache/huggingface/hub", "/h/.cache/pipeline"));
        let caches = ("XDG_CACHE_HOME", "/c");
        assert_eq!(folders(&[home, caches]), expected("/c/huggingface/hub", "/c/pipeline"));
        assert_eq!(folders(&[home, ("HF_HOME", "/f")]), expected("/f/hub", "/h/.cache/pipeline"));
        assert_eq!(folders(&[home, ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/b")]).0, "/b");
    }

    #[test]
    fn the_token_comes_from_the_environment_or_its_file_and_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        fs::write(folder.path().join("token"), "from-home\n").unwrap();
        fs::write(folder.path().join("other"), "from-path").unwrap();
        let other = format!("{home}/other");
        let token = |variables: &[(&str, &str)]| settings(variables).token.map(|token| token.0);
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", " given ")]).as_deref(), Some("given"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", " ")]).as_deref(), Some("from-home"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN_PATH", &other)]).as_deref(), Some("from-path"));
        assert_eq!(token(&[("HF_HOME", "/nowhere")]), None);
        let shown = format!("{:?}", settings(&[("HF_TOKEN", "secret")]));
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn the_hub_is_where_it_is_said_to_be() {
        let endpoint = |variables: &[(&str, &str)]| settings(variables).endpoint;
        assert_eq!(endpoint(&[("HF_ENDPOINT", "https://mirror.org/hf/")]), "https://mirror.org/hf");
        assert_eq!(endpoint(&[]), "https://huggingface.co");
        let offline = |value: &str| settings(&[("HF_HUB_OFFLINE", value)]).offline;
        assert_eq!(["1", "true", "0", "", "no"].map(offline), [true, true, false, false, false]);
    }
}
