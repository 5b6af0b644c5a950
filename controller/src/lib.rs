//! The replicated brain of Pageport.
