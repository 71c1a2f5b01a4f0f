//! Memory copies chosen per platform by search: the fastest way to copy differs with the size, with the processor, and with
//! where source and destination lie (Asterope, PLOS 2021; the pipelined copy of Polytropon, SoCC 2020).
//!
//! A [`Variant`](variant::Variant) is a point of the parameter space, [`emit`](emit::emit) makes machine code of it,
//! [`Code`](code::Code) keeps such code in memory that can be executed and no more be changed, a [`Plan`](plan::Plan) says which
//! variant copies which sizes in which [`Situation`](plan::Situation), and an [`Engine`](engine::Engine) is a plan at work.
//!
//! Without the feature `std` nothing here needs a C library, allocates, or panics on input.

#![cfg_attr(not(feature = "std"), no_std)]

#[cfg(target_arch = "x86_64")]
pub mod code;
#[cfg(target_arch = "x86_64")]
pub mod emit;
#[cfg(target_arch = "x86_64")]
mod encode;
pub mod engine;
pub mod features;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub mod measure;
pub mod plan;
#[cfg(feature = "std")]
pub mod space;
#[cfg(target_arch = "x86_64")]
mod sys;
mod text;
pub mod variant;
pub mod word;
