"""XLA's flags for tests: what compiles fast, for programs that hardly run.

Compiling is most of a test's time. Unoptimized machine code, and fusions written by XLA's older
emitters, take a third of it; one piece of code takes less than pieces for threads that are busy.
"""

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
