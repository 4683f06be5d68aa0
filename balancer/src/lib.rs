//! Dynamic memory over one host.
