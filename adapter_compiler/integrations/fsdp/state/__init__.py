"""The training state of a sharded model, saved and loaded by all ranks through ``torch.distributed.checkpoint``.

The folder has a header, which says sites, ranks, dtypes and shapes, and the tensors. A load reads the header first,
checks it, allocates tensors of these shapes on the present ranks, and only then reads them:

    sharded_state.safetensors    the header, written last: an earlier state stays whole until then
    data-<random>/               what ``torch.distributed.checkpoint`` wrote
"""
