"""Compile a backend's Triton kernels for chips that are not here, and see what they would take of them.

    llmkernels compile --backend triton --target gfx942

What is compiled is what the backend launches (launches.py), each in a process that can be stopped (build.py); what it
takes is read from the machine code (resources.py), and compared with the chip (chips.py) and with what was kept
(record.py).
"""
