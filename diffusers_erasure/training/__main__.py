"""The command `erase` in several processes.

accelerate launch -m diffusers_erasure.training cat -o no-cat --method esd        on GPUs
torchrun --nproc_per_node 2 -m diffusers_erasure.training cat -o no-cat ...       on a CPU, where accelerate starts one
"""

import sys

from diffusers_erasure_cli.app import main


if __name__ == "__main__":
    sys.argv.insert(1, "erase")
    main()
