"""How fast grok1 is on this machine, as ratios: `python -m benchmarks` from the repository root.

Every rate is measured in rounds that take turns with what it is compared to, because a shared
machine may change its speed by half within a minute; what is reported is the median over the rounds
of the ratio within each. The other sides are

* the roofline: for decoding, the bytes that a step must read over the bandwidth of the machine's
  memory; for prefill, the operations that it must do over the rate of a plain matrix product;
* the dense reference: a decode step that turns every expert to floats for each token, as the
  released code does;
* the same model with experts in int8, for one in 4 bits (`--only int4`), also out of core with as
  many layers as Grok-1 has (`--only offload`);
* llama.cpp, on a CPU, where it is given.

    __main__   the command line
    suite      which sections are measured, in which processes, and what becomes of a failure
    sections   what is measured, and against what, in rounds
    setting    how much is measured of which model, and the processes that hold it
    figures    a figure, and the rounds that it comes from
    models     which models, and their files
    machine    the child process that holds a model, and the disk
    peers      llama.cpp, and the dense reference
    report     the table and the JSON
    worker     what runs in the child
    workload   generation with a clock; bytes, operations, and the machine's rates
    deep       many layers out of core, from the files of a few
    device     what the compiled steps hold in memory, and do, kernel by kernel
    gpu_check  what a GPU has to show; `gpu_timing` of its speed, `gpu_int4` of 4-bit experts,
               `gpu_probe` beside another's kernels, `gpu_files` and `load_phases` of files,
               `offload_phases` of experts
"""
