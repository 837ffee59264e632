# Sourced by the other scripts, on each node: folders for what Triton and torch.compile compile. They are on the node,
# because shared homes are slow, and ranks of other nodes would race for them. What lies in them is run. So a name
# below /tmp, which anybody on the node could have taken first, has to be a folder that is one's own, with mode 700.
if [[ -z ${TRITON_CACHE_DIR:-} || -z ${TORCHINDUCTOR_CACHE_DIR:-} ]]; then
    own_cache=${TMPDIR:-/tmp}/tritongpt-$(id -u)
    mkdir -m 700 -- "$own_cache" 2>/dev/null || true
    if [[ -L $own_cache || ! -d $own_cache || ! -O $own_cache ]] || ! chmod 700 -- "$own_cache"; then
        echo "$own_cache is not a folder of your own; name others in TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR" >&2
        exit 2
    fi
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$own_cache/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$own_cache/inductor}
fi
