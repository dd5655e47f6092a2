//! Rows of a Parquet file, as the JSON that the same rows would be in a file of lines.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, anyhow};
use contract::files::in_words;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value as Json};

/// What a Parquet file begins and ends with.
pub(crate) const MAGIC: &[u8] = b"PAR1";

/// Hands on the rows of a file, until `take` errs. `most` is how many bytes it may unfold to.
///
/// Errors when the file is damaged, or packed in a way that is not read.
pub(crate) fn each<E: From<anyhow::Error>>(
    file: File,
    most: u64,
    mut take: impl FnMut(Map<String, Json>) -> Result<(), E>,
) -> Result<(), E> {
    let reader = guarded(|| SerializedFileReader::new(file))?;
    let groups = reader.metadata().row_groups();
    let unfolded: u64 = groups
        .iter()
        .map(|group| u64::try_from(group.total_byte_size()).unwrap_or(u64::MAX))
        .fold(0, u64::saturating_add);
    if unfolded > most {
        return Err(anyhow!("it unfolds to {}, which no file of text does", in_words(unfolded)).into());
    }
    let mut rows = guarded(|| reader.get_row_iter(None))?;
    while let Some(row) = guarded(|| rows.next().transpose())? {
        take(object(&row)?)?;
    }
    Ok(())
}

/// The library is not made for files that are damaged, and panics over some.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T> {
    let damaged =
        |what: &str| anyhow!("it is not read as Parquet, which it begins as; it may be cut short or damaged: {what}");
    let packing =
        |what: &str| anyhow!("it is packed in a way that is not read ({what}); save it with snappy, gzip or zstd");
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| match &error {
            ParquetError::NYI(what) => packing(what),
            ParquetError::General(what) if what.contains("Disabled feature") => packing(what),
            other => damaged(&other.to_string()),
        }),
        Err(_) => Err(damaged("its pages are not what its end says")),
    }
}

fn object(row: &Row) -> Result<Map<String, Json>> {
    row.get_column_iter().map(|(name, field)| Ok((name.clone(), json(field)?))).collect()
}

/// A value of a column. What has no spelling in JSON, such as a picture, is an object, which nobody takes for text.
fn json(field: &Field) -> Result<Json> {
    let float = |value: f64| Number::from_f64(value).map_or(Json::Null, Json::Number);
    Ok(match field {
        Field::Null => Json::Null,
        Field::Bool(value) => Json::Bool(*value),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => float(f64::from(*value)),
        Field::Double(value) => float(*value),
        Field::Str(text) => Json::String(text.clone()),
        // Text that an old writer did not mark as such.
        Field::Bytes(bytes) => match str::from_utf8(bytes.data()) {
            Ok(text) => Json::String(text.to_owned()),
            Err(_) => Json::Object(Map::from_iter([("bytes".to_owned(), bytes.len().into())])),
        },
        Field::Group(row) => Json::Object(object(row)?),
        Field::ListInternal(list) => Json::Array(list.elements().iter().map(json).collect::<Result<_>>()?),
        Field::MapInternal(map) => {
            let entry = |(key, value): &(Field, Field)| {
                let Json::String(key) = json(key)? else { return Ok(None) };
                Ok(Some((key, json(value)?)))
            };
            Json::Object(map.entries().iter().map(entry).filter_map(Result::transpose).collect::<Result<_>>()?)
        }
        other => Json::String(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use serde_json::json;

    use super::*;
    use crate::records;
    use crate::testing::Scratch;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/parquet").join(name)
    }

    fn rows(path: &Path) -> Result<Vec<Json>> {
        let mut rows = Vec::new();
        records::read(path, |record| {
            rows.push(Json::Object(record.fields));
            Ok(())
        })?;
        Ok(rows)
    }

    #[test]
    fn rows_that_python_wrote_are_those_of_the_lines() {
        let expected = rows(&fixture("rows.jsonl")).unwrap();
        for name in ["none", "snappy", "gzip", "zstd", "plain"] {
            let mut found = rows(&fixture(&format!("{name}.parquet"))).unwrap();
            for row in &mut found {
                let row = row.as_object_mut().unwrap();
                // What JSON has no spelling for is still there, and no text.
                assert_eq!(row.shift_remove("picture"), Some(json!({"bytes": 3})), "{name}");
                assert!(row.shift_remove("day").unwrap().as_str().unwrap().starts_with("2024-07-26"), "{name}");
            }
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn a_row_is_named_by_its_number() {
        let mut places = Vec::new();
        let error = records::read(&fixture("snappy.parquet"), |record| {
            places.push(record.place.clone());
            anyhow::bail!("`{}` is odd", record.place)
        });
        assert!(places[0].ends_with("snappy.parquet, row 1") && places[19].ends_with("row 20"), "{places:?}");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("20 rows of") && error.contains("snappy.parquet, row 2` is odd"), "{error}");
    }

    #[test]
    fn another_packing_is_named_with_those_that_are_read() {
        let error = rows(&fixture("brotli.parquet")).unwrap_err().to_string();
        assert!(error.contains("brotli") && error.contains("save it with snappy, gzip or zstd"), "{error}");
    }

    /// Cut anywhere, or with any byte changed: an error or rows, and no panic that leaves the reader.
    #[test]
    fn a_damaged_file_is_an_error() {
        let scratch = Scratch::new();
        let whole = fs::read(fixture("snappy.parquet")).unwrap();
        for length in [4, 8, 100, whole.len() / 2, whole.len() - 1] {
            let error = rows(&scratch.file("cut.parquet", &whole[..length])).unwrap_err().to_string();
            assert!(error.contains("cut.parquet`") && error.contains("as Parquet"), "{length}: {error}");
        }
        let mut refused = 0;
        for at in (4..whole.len()).step_by(37) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            refused += usize::from(rows(&scratch.file("damaged.parquet", &damaged)).is_err());
        }
        assert!(refused > 20, "{refused}");
    }

    #[test]
    fn what_unfolds_without_end_is_refused_before_it_is_read() {
        let file = fs::File::open(fixture("snappy.parquet")).unwrap();
        let error = each(file, 1000, |_| Ok::<_, anyhow::Error>(())).unwrap_err().to_string();
        assert!(error.contains("which no file of text does"), "{error}");
    }
}
