"""What a PyTorch user would run on the reduced matrices of the decomposition, timed on one GPU. Prints one JSON line per case.

S and F of 1,776 heads (L = 512, d = 64, float32) are reduced to 128 x 128 by torch.linalg.qr, which is timed too; then their singular
values, by each driver of cuSOLVER that torch.linalg.svdvals has, and, of F, by its eigenvalues. A case that would take more than
`limit` seconds is timed on fewer matrices, and says on how many; they are independent of each other.
"""
import json, math, time, torch
dev="cuda"; torch.manual_seed(0); limit=6.0
def out(**k): print(json.dumps(k), flush=True)
def once(fn):
    torch.cuda.synchronize(); a=time.perf_counter(); fn(); torch.cuda.synchronize(); return (time.perf_counter()-a)*1e3
def guard(name, fn, x, **k):
    try:
        few=x[:64]; fn(few); each=once(lambda: fn(few))/len(few)
        count=min(len(x), max(64, int(limit*1e3/each/4))); some=x[:count]
        fn(some); ms=sorted(once(lambda: fn(some)) for _ in range(3))[1]
        out(case=name, ms=round(ms,3), matrices=count, of=len(x), **k)
    except Exception as e: out(case=name, error=str(e)[:160], **k)
p=torch.cuda.get_device_properties(0); out(device=p.name, torch=torch.__version__, cuda=torch.version.cuda)
heads,L,d=1776,512,64
Q,K=[torch.randn(heads,L,d,device=dev) for _ in range(2)]
guard("sd_qr", lambda x: torch.linalg.qr(x, mode="r"), torch.cat([Q,K],-1), L=L, columns=2*d)
T=torch.linalg.qr(torch.cat([Q,K],-1).double(), mode="r")[1]; M=T[...,:d]@T[...,d:].transpose(-1,-2)/math.sqrt(d)
S,F=((M-M.transpose(-1,-2))/2).float(),((M+M.transpose(-1,-2))/2).float()
parts=torch.stack([S,F],1).flatten(0,1)
for driver in (None,"gesvdj","gesvda","gesvd"):
    guard("sd_svdvals", lambda x: torch.linalg.svdvals(x, driver=driver), parts, driver=driver or "default", n=2*d)
guard("sd_eigvalsh", torch.linalg.eigvalsh, F, n=2*d, of_F_alone=True)
