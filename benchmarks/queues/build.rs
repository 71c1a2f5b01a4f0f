//! Compiles the C++ shims, if they are asked for.

fn main() {
    println!("cargo::rerun-if-changed=src/rivals/shims.cc");
    #[cfg(feature = "cpp")]
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        .flag("-march=native")
        .flag("-mcx16")
        .file("src/rivals/shims.cc")
        .compile("queue_shims");
}
