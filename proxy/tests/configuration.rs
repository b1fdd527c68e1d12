//! Static configurations as a whole: the files in `config/`, and what is refused or warned of, in which words.

#[path = "configuration/bind.rs"]
mod bind;
#[path = "configuration/build.rs"]
mod build;
#[path = "configuration/data_path.rs"]
mod data_path;
#[path = "configuration/files.rs"]
mod files;
#[path = "configuration/health.rs"]
mod health;
#[path = "configuration/refused.rs"]
mod refused;
#[path = "configuration/warned.rs"]
mod warned;
