//! `/logging`: shows and changes levels.

use std::fmt::Write;

use super::State;

/// Envoy's level names.
const LEVELS: [&str; 7] = ["trace", "debug", "info", "warning", "error", "critical", "off"];

const USAGE: &str = "\
usage: /logging?<name>=<level> (change single level)
usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)
usage: /logging?level=<level> (change all levels)
usage: /logging?group=<group_name>:<level> (change group of loggers)
levels: trace debug info warning error critical off 
";

/// Applies the parameters and shows all levels. The error text is for the operator, with the usage.
pub(super) fn answer(state: &dyn State, parameters: &[(String, String)]) -> Result<String, String> {
    let result = parameters.iter().try_for_each(|(name, value)| change(state, name, value));
    let mut active = String::new();
    for (name, level) in state.log_levels() {
        // Writing to a String can't fail.
        let _ = writeln!(active, "  {name}: {level}");
    }
    match result {
        Ok(()) => Ok(format!("active loggers:\n{active}\n")),
        Err(error) => Err(format!("error: {error}\n\n{USAGE}active loggers:\n{active}\n")),
    }
}

fn change(state: &dyn State, name: &str, value: &str) -> Result<(), String> {
    match name {
        "level" => set(state, None, value),
        // All or nothing: one wrong entry changes no level.
        "paths" => {
            let pairs: Vec<_> = value
                .split(',')
                .filter(|pair| !pair.is_empty())
                .map(|pair| pair.split_once(':').ok_or_else(|| format!("'{pair}' is not <name>:<level>")))
                .collect::<Result<_, _>>()?;
            pairs.iter().try_for_each(|(_, level)| known(level))?;
            pairs.into_iter().try_for_each(|(logger, level)| set(state, Some(logger), level))
        }
        "group" => Err("there are no logger groups".into()),
        logger => set(state, Some(logger), value),
    }
}

fn set(state: &dyn State, logger: Option<&str>, level: &str) -> Result<(), String> {
    known(level)?;
    state.set_log_level(logger, level)
}

fn known(level: &str) -> Result<(), String> {
    if LEVELS.contains(&level) { Ok(()) } else { Err("unknown logger level".into()) }
}
