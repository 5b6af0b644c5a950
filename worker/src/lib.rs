//! The Pageport daemon on each hypervisor host.
