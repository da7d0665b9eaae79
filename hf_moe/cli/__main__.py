from hf_moe.cli import main

main()
