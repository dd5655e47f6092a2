//! What everything stands on: who is to blame, what people see, places in texts, signals. It knows neither pipelines nor
//! stages.

pub(crate) mod clock;
pub(crate) mod memory;
pub(crate) mod output;
pub(crate) mod signals;
pub(crate) mod source;
pub(crate) mod terminal;
pub(crate) mod trouble;
