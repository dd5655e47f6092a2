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
    let unfolded: u64 = groups.iter().map(|group| u64::try_from(group.total_byte_size()).unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
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
    let damaged = |what: &str| anyhow!("it is not read as Parquet, which it begins as; it may be cut short or damaged: {what}");
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| match &error {
            ParquetError::NYI(what) => anyhow!("it is packed in a way that is not read ({what}); save it with snappy, gzip or zstd"),
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

/// Files for tests.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    /// The leaves of a column: values, and their levels where it may repeat or be absent.
    pub(crate) struct Leaf {
        pub(crate) values: Vec<&'static str>,
        pub(crate) defined: Vec<i16>,
        pub(crate) repeated: Vec<i16>,
    }

    impl Leaf {
        /// Of a column of texts that are all there.
        pub(crate) fn required(values: &[&'static str]) -> Self {
            Leaf { values: values.to_vec(), defined: Vec::new(), repeated: Vec::new() }
        }
    }

    /// A file with one group of rows.
    pub(crate) fn write(schema: &str, leaves: &[Leaf], compression: Compression) -> Vec<u8> {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut leaves = leaves.iter();
        while let Some(mut column) = group.next_column().unwrap() {
            let Leaf { values, defined, repeated } = leaves.next().unwrap();
            let levels = |levels: &'_ [i16]| (!levels.is_empty()).then(|| levels.to_vec());
            let (defined, repeated) = (levels(defined), levels(repeated));
            match column.untyped() {
                ColumnWriter::ByteArrayColumnWriter(writer) => {
                    let values: Vec<ByteArray> = values.iter().map(|value| (*value).into()).collect();
                    writer.write_batch(&values, defined.as_deref(), repeated.as_deref()).unwrap();
                }
                ColumnWriter::Int64ColumnWriter(writer) => {
                    let values: Vec<i64> = values.iter().map(|value| value.parse().unwrap()).collect();
                    writer.write_batch(&values, defined.as_deref(), repeated.as_deref()).unwrap();
                }
                _ => panic!("a column of texts or numbers"),
            }
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        bytes
    }
}
