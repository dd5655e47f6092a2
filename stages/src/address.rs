//! Where a file or folder is, as a pipeline writes it: a path, a place on the Hugging Face hub, or an address of the web with
//! the digest of what is there.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use contract::location::HUB;
use contract::{FileDigest, HubPath, Location, WebFile};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where a file or folder is.
#[derive(Clone, Debug, PartialEq)]
pub enum Address {
    /// A path, or `hub:` and what follows it.
    Text(String),
    /// Of the web.
    Web(Web),
}

/// A file of the web. One digest says what it holds, so that the result does not depend on who serves it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Web {
    /// Its address, which begins with `https://`.
    pub url: String,
    /// SHA-256 of the file, as `sha256sum` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// BLAKE3 of the file, as `b3sum` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
}

impl Address {
    /// Where that is. Errors say what is expected.
    pub(crate) fn location(&self) -> Result<Location, String> {
        match self {
            Address::Text(text) => match text.strip_prefix(HUB) {
                Some(rest) => HubPath::parse(rest).map(Location::Hub),
                None if text.starts_with("https://") || text.starts_with("http://") => {
                    Err("an address of the web needs the digest of what is there: `{url: ..., sha256: ...}`".into())
                }
                None => Ok(Location::Local(text.into())),
            },
            Address::Web(Web { url, sha256, blake3 }) => {
                let digest = match (sha256, blake3) {
                    (Some(digits), None) => FileDigest::Sha256(digits.clone()),
                    (None, Some(digits)) => FileDigest::Blake3(digits.clone()),
                    _ => return Err("expected one of `sha256` and `blake3` beside `url`".into()),
                };
                let file = WebFile { url: url.clone(), digest };
                file.check().map(|()| Location::Web(file))
            }
        }
    }

    /// The path of what is on this machine: of everything in a running stage, for which the runner has fetched the rest.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        match self.location() {
            Ok(Location::Local(path)) => Ok(path),
            Ok(elsewhere) => bail!("`{elsewhere}` was not fetched: a fault of the runner"),
            Err(text) => bail!(text),
        }
    }

    /// The same, where something is there already.
    pub(crate) fn path_at_hand(&self) -> Option<PathBuf> {
        self.path().ok().filter(|path| path.exists())
    }
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Self {
        Address::Text(path.display().to_string())
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Address::Text(text) => serializer.serialize_str(text),
            Address::Web(web) => web.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AddressVisitor;
        impl<'de> Visitor<'de> for AddressVisitor {
            type Value = Address;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, `hub:OWNER/NAME`, or `{url: ..., sha256: ...}`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Address, E> {
                Ok(Address::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Address, A::Error> {
                Web::deserialize(MapAccessDeserializer::new(map)).map(Address::Web)
            }
        }
        deserializer.deserialize_any(AddressVisitor)
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let web = generator.subschema_for::<Web>();
        json_schema!({"anyOf": [{"type": "string"}, web]})
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    #[test]
    fn an_address_reads_back_and_says_what_it_lacks() {
        let read = |json: &Json| serde_json::from_value::<Address>(json.clone()).unwrap();
        let digits = "0f".repeat(32);
        let cases = [
            (json!("a/b.jsonl"), "a/b.jsonl"),
            (json!("hub:a/b@v1/c"), "hub:a/b@v1/c"),
            (json!({"url": "https://x.org/a?k=s", "sha256": digits}), "https://x.org/a"),
            (json!({"url": "https://x.org/a", "blake3": digits}), "https://x.org/a"),
        ];
        for (json, shown) in cases {
            let address = read(&json);
            assert_eq!(serde_json::to_value(&address).unwrap(), json);
            assert_eq!(address.location().unwrap().to_string(), shown);
        }
        let refused = |json: Json| read(&json).location().unwrap_err();
        assert!(refused(json!("https://x.org/a")).contains("`{url: ..., sha256: ...}`"));
        assert!(refused(json!("hub:gpt2")).contains("expected `hub:OWNER/NAME`"));
        assert!(refused(json!({"url": "https://x.org/a"})).contains("one of `sha256` and `blake3`"));
        assert!(refused(json!({"url": "http://x.org/a", "sha256": digits})).contains("not encrypted"));
        assert!(refused(json!({"url": "https://x.org/a", "sha256": "0f"})).contains("64 lower-case"));
        let unknown = serde_json::from_value::<Address>(json!({"url": "https://x.org", "md5": "0f"})).unwrap_err();
        assert!(unknown.to_string().contains("md5"), "{unknown}");
    }
}
