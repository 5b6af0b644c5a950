//! Work at a site of the lab: on a thread inside its namespace, with a runtime of its own, so that every connection begins there.

use tokio::runtime::Builder;
use tokio::sync::oneshot;

use super::BenchError;
use crate::lab::Lab;
use crate::netns;

/// Runs what `work` makes at a site. It ends by itself: dropping the handle does not end it.
pub fn at<T, F>(lab: &Lab, site: &str, work: impl FnOnce() -> F + Send + 'static) -> Work<T>
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    let (done, result) = oneshot::channel();
    let namespace = lab.network().namespace(site).to_owned();
    std::thread::spawn(move || {
        let outcome = netns::within(&namespace, move || -> std::io::Result<T> {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(async { work().await }))
        });
        // Whoever wanted to know may be gone.
        done.send(outcome.and_then(|inner| inner)).ok();
    });
    Work { site: site.to_owned(), result }
}

/// Work under way.
#[derive(Debug)]
pub struct Work<T> {
    site: String,
    result: oneshot::Receiver<std::io::Result<T>>,
}

impl<T> Work<T> {
    /// Waits for its result.
    ///
    /// # Errors
    /// When it could not begin, or panicked.
    pub async fn done(self) -> Result<T, BenchError> {
        let outcome = self.result.await.unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")));
        outcome.map_err(|source| BenchError::Site { site: self.site, source })
    }
}
