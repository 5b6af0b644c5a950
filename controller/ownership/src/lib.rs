//! Who may run a VM: pure state machines without I/O.
