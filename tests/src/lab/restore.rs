//! All controllers of a lab are lost, and one begins anew from a backup.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use super::{Lab, LabError, settings};
use crate::paths;

impl Lab {
    /// Ends all controllers, takes their data away, and starts one at a site from a backup. The workers find it where that site's controller was.
    ///
    /// # Errors
    /// The backup is refused, or the controller does not start.
    pub async fn restore_controllers(&mut self, site: &str, backup: &Path) -> Result<(), LabError> {
        let before = self.controller(site).config().to_owned();
        for (site, mut lost) in std::mem::take(&mut self.controllers) {
            lost.kill()?;
            let data = self.folders.run.join("data").join(settings::controller_name(&site));
            fs::remove_dir_all(&data).map_err(|source| LabError::Io { operation: "remove", path: data, source })?;
        }
        let name = format!("controller-restored-{site}");
        let text = settings::only_controller(&before, site, &self.data_folder(&name)?)?;
        let config = self.write_config(&name, &text)?;
        let restore = ["cluster", "restore", "--controller-config"].map(OsStr::new);
        let restored = self.ctl(restore.into_iter().chain([config.as_os_str(), backup.as_os_str()])).await;
        restored.map_err(|source| LabError::Restore { backup: backup.to_owned(), source: Box::new(source) })?;
        let daemon = self.start_daemon(&name, site, &paths::program("pageport-controller"), &config, &[])?;
        self.controllers.insert(site.to_owned(), daemon);
        Ok(())
    }
}
