//! [`Arena`]: three controllers and their simulated workers, and the questions that every stage asks.

use std::time::{Duration, Instant};

use pageport_common::tls::Identity;
use tokio::time::sleep;

use super::client::{Client, PATIENCE};
use super::fleet::{Fleet, load};
use super::{BenchError, Effort, Size, site};
use crate::lab::network::SITES;
use crate::lab::{Daemons, Lab, LabConfig};

const POLL: Duration = Duration::from_millis(100);
const FINE_POLL: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Debug)]
pub struct Arena {
    // Dropped in this order: the workers before the controllers.
    _fleet: Fleet,
    pub(super) lab: Lab,
    pub(super) identity: Identity,
    pub(super) size: Size,
    pub(super) effort: Effort,
    /// When the workers were started.
    pub(super) began: Instant,
}

/// A controller's site and address.
pub(super) type Seat = (&'static str, String);

impl Arena {
    /// Returns when the controllers run; the workers connect meanwhile.
    pub(super) async fn start(size: Size, effort: Effort) -> Result<Self, BenchError> {
        let lab = Lab::start(LabConfig { daemons: Daemons::Controllers, ..LabConfig::default() }).await?;
        let identity = load(lab.operator())?;
        let began = Instant::now();
        let fleet = Fleet::start(&lab, size)?;
        Ok(Self { _fleet: fleet, lab, identity, size, effort, began })
    }

    fn seat(&self, site: &'static str) -> Seat {
        (site, self.lab.network().addresses().of(site).api.to_string())
    }

    /// The leader, and the others.
    pub(super) async fn seats(&self) -> Result<(Seat, Vec<Seat>), BenchError> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            let status = self.lab.ctl_json(["cluster", "status"]).await?;
            let members = status["members"].as_array().into_iter().flatten();
            let leader = members.filter(|member| member["leader"] == true).find_map(|member| member["site"].as_str());
            if let Some(leader) = SITES.into_iter().find(|site| Some(*site) == leader) {
                let others = SITES.into_iter().filter(|site| *site != leader).map(|site| self.seat(site));
                return Ok((self.seat(leader), others.collect()));
            }
            sleep(POLL).await;
        }
        Err(BenchError::Unknown { what: "who leads" })
    }

    /// Has clients at the leader's site do something.
    pub(super) async fn at_leader<T, F>(&self, work: impl FnOnce(Client) -> F + Send + 'static) -> Result<T, BenchError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, BenchError>>,
    {
        let ((place, address), _) = self.seats().await?;
        let identity = self.identity.clone();
        site::at(&self.lab, place, move || async move { work(Client::many(&identity, &address)?).await }).done().await?
    }

    /// Returns when all workers are connected to whoever leads.
    pub(super) async fn all_connected(&self) -> Result<(), BenchError> {
        let begin = Instant::now();
        let mut seen = 0;
        while begin.elapsed() < PATIENCE {
            // There may be no leader just now.
            if let Ok(answer) = self.lab.ctl_json(["worker", "list"]).await {
                let workers = answer["workers"].as_array().into_iter().flatten();
                seen = workers.filter(|worker| worker["connected"] == true).count();
                if seen == self.size.workers {
                    return Ok(());
                }
            }
            sleep(POLL).await;
        }
        Err(BenchError::Late { what: "wait for the workers", said: format!("{seen} are connected") })
    }

    /// Returns when the controller at a site has applied so much.
    pub(super) async fn caught_up(
        &self,
        place: &'static str,
        address: String,
        committed: u64,
    ) -> Result<(), BenchError> {
        let identity = self.identity.clone();
        let back = move || async move {
            let client = Client::one(&identity, &[address])?;
            let begin = Instant::now();
            while client.status().await?.applied_index < committed {
                if begin.elapsed() > PATIENCE {
                    return Err(BenchError::Late {
                        what: "wait for a controller",
                        said: "it lacks entries".to_owned(),
                    });
                }
                sleep(FINE_POLL).await;
            }
            Ok(())
        };
        site::at(&self.lab, place, back).done().await?
    }
}

/// Looks until there are so many.
pub(super) async fn until<F>(wanted: usize, what: &'static str, look: impl Fn() -> F) -> Result<(), BenchError>
where
    F: Future<Output = Result<usize, BenchError>>,
{
    let begin = Instant::now();
    let mut seen = look().await?;
    while seen < wanted {
        if begin.elapsed() > PATIENCE {
            return Err(BenchError::Late { what, said: format!("{seen} of {wanted}") });
        }
        sleep(POLL).await;
        seen = look().await?;
    }
    Ok(())
}
