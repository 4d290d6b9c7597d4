"""What a PyTorch user would run instead, timed on one GPU. Prints one JSON line per case.

usage: torch_gpu.py [attention] [sisa] [interdomain] [s4d] [s4d_sweep]   (no names: everything)
"""
import json, math, sys, torch, torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend as SB
dev="cuda"; torch.manual_seed(0)
def wanted(name): return len(sys.argv)<2 or name in sys.argv[1:]
def t(fn, n=20, w=5):
    for _ in range(w): fn()
    torch.cuda.synchronize(); ts=[]
    for _ in range(n):
        a=torch.cuda.Event(True); b=torch.cuda.Event(True); a.record(); fn(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    ts.sort(); return ts[len(ts)//2]
def out(**k): print(json.dumps(k), flush=True)
def guard(name, fn, **k):
    try:
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        ms=fn(); out(case=name, ms=round(ms,4), peak_gb=round(torch.cuda.max_memory_allocated()/1e9,2), **k)
    except Exception as e: out(case=name, error=str(e)[:160], **k)
p=torch.cuda.get_device_properties(0); out(device=p.name, sms=p.multi_processor_count, torch=torch.__version__, cuda=torch.version.cuda)
x=torch.empty(1<<30,dtype=torch.uint8,device=dev); y=torch.empty_like(x); ms=t(lambda: y.copy_(x)); out(case="copy", GBps=round(2*x.numel()/ms/1e6,0)); del x,y
a=torch.randn(8192,8192,device=dev,dtype=torch.bfloat16); ms=t(lambda: a@a); out(case="gemm8192_bf16", TFLOPs=round(2*8192**3/ms/1e9,0)); del a
# ---- 1. SDPA without augmentation, causal, bf16
def fb(f, *ins):
    def g():
        o=f(*ins); o.backward(go[o.shape]) if o.shape in go else o.backward(torch.ones_like(o))
        for i in ins: i.grad=None
    return g
go={}
attention_shapes=[(1,32,1024,64),(1,32,4096,64),(8,12,2048,64),(64,32,256,64),(4,32,4096,128),(4,32,4096,64),(2,32,16384,64)]
for (B,H,L,d) in attention_shapes if wanted("attention") else attention_shapes[-2:] if wanted("sisa") else []:
    q,k,v=[torch.randn(B,H,L,d,device=dev,dtype=torch.bfloat16,requires_grad=True) for _ in range(3)]
    go[(B,H,L,d)]=torch.randn(B,H,L,d,device=dev,dtype=torch.bfloat16); go={torch.Size(s):g for s,g in go.items()}
    for nm,bk in [("flash",SB.FLASH_ATTENTION),("cudnn",SB.CUDNN_ATTENTION),("efficient",SB.EFFICIENT_ATTENTION)]:
        def f(q,k,v):
            with sdpa_kernel([bk]): return F.scaled_dot_product_attention(q,k,v,is_causal=True)
        def fw():
            with torch.no_grad(): f(q,k,v)
        guard("sdpa_fwd", lambda: t(fw), backend=nm, B=B,H=H,L=L,d=d)
        guard("sdpa_fwdbwd", lambda: t(fb(f,q,k,v)), backend=nm, B=B,H=H,L=L,d=d)
        if nm=="flash":  # gradients of queries added in a fixed order, as ours always are
            torch.use_deterministic_algorithms(True)
            guard("sdpa_fwdbwd", lambda: t(fb(f,q,k,v)), backend="flash, deterministic", B=B,H=H,L=L,d=d)
            torch.use_deterministic_algorithms(False)
    # ---- 2. SISA as published: channels from projections, augmented q/k, one SDPA
    for ds in (16,32,64,128) if wanted("sisa") else ():
        Bc,Cc=[torch.randn(B,H,L,ds,device=dev,dtype=torch.bfloat16,requires_grad=True) for _ in range(2)]
        la=(-F.softplus(torch.randn(B,H,L,device=dev)*0.02-5)).requires_grad_(); th=(torch.randn(B,H,L,ds//2,device=dev)*0.1).requires_grad_(); lam=torch.full((H,),-1.0,device=dev,requires_grad=True)
        def rot(z,phi):
            e,o=z[...,0::2],z[...,1::2]; c,s=phi.cos(),phi.sin(); return torch.stack([e*c-o*s,e*s+o*c],-1).flatten(-2)
        def sisa(q,k,v,Bc,Cc,la,th,lam, bks):
            g=torch.cumsum(la,2); ph=torch.cumsum(th,2); c=(g.amax(2,keepdim=True)+g.amin(2,keepdim=True))/2
            gc=(g-c).unsqueeze(-1).clamp(-11,11); Cb=rot(Cc.float()*gc.exp(),ph).to(q.dtype); Bb=rot(Bc.float()*(-gc).exp(),ph).to(q.dtype)
            s=(d**0.25*F.softplus(lam).sqrt()).view(1,H,1,1).to(q.dtype)
            with sdpa_kernel(bks): return F.scaled_dot_product_attention(torch.cat([q,s*Cb],-1),torch.cat([k,s*Bb],-1),v,scale=d**-0.5,is_causal=True)
        ins=(q,k,v,Bc,Cc,la,th,lam)
        for nm,bks in [("efficient",[SB.EFFICIENT_ATTENTION]),("best_of_all",[SB.CUDNN_ATTENTION,SB.FLASH_ATTENTION,SB.EFFICIENT_ATTENTION])]:
            fn=lambda *i: sisa(*i,bks)
            def fw():
                with torch.no_grad(): fn(*ins)
            guard("sisa_fwd", lambda: t(fw,10,3), backend=nm,B=B,H=H,L=L,d=d,ds=ds)
            guard("sisa_fwdbwd", lambda: t(fb(fn,*ins),10,3), backend=nm,B=B,H=H,L=L,d=d,ds=ds)
        if ds in (16,32) :
            try:
                cf=torch.compile(lambda *i: sisa(*i,[SB.EFFICIENT_ATTENTION]))
                guard("sisa_compiled_fwdbwd", lambda: t(fb(cf,*ins),10,3), B=B,H=H,L=L,d=d,ds=ds)
            except Exception as e: out(case="sisa_compiled", error=str(e)[:100])
        del Bc,Cc,la,th,lam,ins
    del q,k,v; go={}
# ---- 3. Interdomain Attention: coefficients of every token formed as written, and products reassociated in chunks
# (docs/ops/interdomain.md); beside them softmax attention of the same shapes
def interdomain_literal(q,k,v,Lam,Bbar,C):
    """X of every token by FFT convolution with Lam^n Bbar, then [U, Gam] = C X."""
    R,L=q.shape[-1],q.shape[2]; z=torch.cat([k,v],-1).float(); n=torch.arange(L,device=dev)[:,None,None]
    kernel=torch.exp(n*Lam.log())*Bbar                                                                       # L,H,M
    X=torch.fft.ifft(torch.fft.fft(z,n=2*L,dim=2)[:,:,:,None,:]*torch.fft.fft(kernel,n=2*L,dim=0).permute(1,0,2)[None,...,None],dim=2)[:,:,:L]
    Y=torch.einsum("hmn,bhlnc->bhlmc",C,X)
    return torch.einsum("bhlm,bhlmd->bhld",torch.einsum("bhlr,bhlmr->bhlm",q.to(Y.dtype),Y[...,:R]),Y[...,R:]).real
def interdomain_chunked(q,k,v,Lam,Bbar,C,T=64):
    """Never U or Gam: a = Xk q, w = C^T C a, o = Re(Xv^T w), with the states that enter chunks of T tokens."""
    B,H,L,R=q.shape; d=v.shape[-1]; n=L//T; log=Lam.log()[:,None,:]; t=torch.arange(T,device=dev)[:,None]; c=Lam.dtype
    q,k,v=[x.float().view(B,H,n,T,-1) for x in (q,k,v)]
    decay=torch.exp((t+1)*log)                                                                               # H,T,M
    lag=(t-t.T).clamp(min=0)[None,:,:,None]*log[:,None]
    table=torch.where((t>=t.T)[None,:,:,None],torch.exp(lag),0)*Bbar[:,None,None,:]                          # H,T,S,M
    adds=torch.einsum("hsm,bhnsc->bhnmc",torch.exp((T-1-t)*log)*Bbar[:,None,:],torch.cat([k,v],-1).to(c))
    state=torch.zeros_like(adds[:,:,0]); entering=[]; whole=torch.exp(T*log)[:,0,:,None]
    for i in range(n): entering.append(state); state=whole*state+adds[:,:,i]
    X=torch.stack(entering,2)
    a=torch.einsum("bhnts,htsm->bhntm",(q@k.transpose(-1,-2)).to(c),table)+decay[:,None]*torch.einsum("bhnmr,bhntr->bhntm",X[...,:R],q.to(c))
    w=torch.einsum("bhntm,hmj->bhntj",a,torch.einsum("ham,haj->hmj",C,C))
    P=torch.einsum("bhntm,htsm->bhnts",w,table).real
    return (P@v+torch.einsum("bhntm,bhnmd->bhntd",w*decay[:,None],X[...,R:]).real).reshape(B,H,L,d)
def interdomain_params(H,M):
    m=torch.arange(M,device=dev); A=torch.complex(torch.full((M,),-.5,device=dev),M/math.pi*(M/(2*m+1)-1))
    dt=torch.exp(torch.rand(H,1,device=dev)*math.log(100)+math.log(1e-3)); Lam=torch.exp(dt*A)
    return Lam,(Lam-1)/A,torch.randn(H,M,M,device=dev,dtype=torch.complex64)/M
if wanted("interdomain"):
    torch.backends.cuda.matmul.allow_tf32=True; M=R=d=64; H=32
    with torch.no_grad():
        ps=interdomain_params(H,M); ins=[torch.randn(1,H,512,64,device=dev) for _ in range(3)]; x,y=interdomain_literal(*ins,*ps),interdomain_chunked(*ins,*ps)
        out(case="interdomain_forms_agree", relative=float((x-y).norm()/x.norm())); del ins,x,y
    for (B,L) in [(1,1024),(1,4096),(4,4096),(2,16384)]:
        ps=[p.requires_grad_() for p in interdomain_params(H,M)]; q,k,v=[torch.randn(B,H,L,64,device=dev,requires_grad=True) for _ in range(3)]
        for nm,f in [("literal",interdomain_literal),("chunked",interdomain_chunked)]:
            def fw():
                with torch.no_grad(): f(q,k,v,*ps)
            guard("interdomain_fwd", lambda: t(fw,5,2), impl=nm,B=B,H=H,L=L,M=M,R=R,d=d)
            guard("interdomain_fwdbwd", lambda: t(fb(f,q,k,v,*ps),5,2), impl=nm,B=B,H=H,L=L,M=M,R=R,d=d)
        q,k,v=[x.detach().bfloat16().requires_grad_() for x in (q,k,v)]; g=torch.randn_like(q)
        go={g.shape:g}
        def soft(q,k,v):
            with sdpa_kernel([SB.CUDNN_ATTENTION]): return F.scaled_dot_product_attention(q,k,v,is_causal=True)
        def fw():
            with torch.no_grad(): soft(q,k,v)
        guard("softmax_beside_interdomain_fwd", lambda: t(fw), backend="cudnn",B=B,H=H,L=L,d=d)
        guard("softmax_beside_interdomain_fwdbwd", lambda: t(fb(soft,q,k,v)), backend="cudnn",B=B,H=H,L=L,d=d)
        go={}; del q,k,v,g,ps
# ---- 4. a decoding step of one layer: state update and readout, in a CUDA graph of 20 steps
for B in (1,8,32,64,128) if wanted("interdomain") else ():
    H,M,R,d=32,64,64,64; Lam,Bbar,C=interdomain_params(H,M); G=torch.einsum("ham,haj->hmj",C,C)
    X=torch.randn(B,H,M,R+d,device=dev,dtype=torch.complex64); z=torch.randn(B,H,R+d,device=dev); q=torch.randn(B,H,R,device=dev)
    def update(): X.mul_(Lam[None,:,:,None]).add_(Bbar[None,:,:,None]*z[:,:,None,:])
    def literal():
        update(); Y=torch.einsum("hmn,bhnc->bhmc",C,X)
        return torch.einsum("bhm,bhmd->bhd",torch.einsum("bhr,bhmr->bhm",q.to(Y.dtype),Y[...,:R]),Y[...,R:]).real
    def associative():
        update(); a=torch.einsum("bhr,bhmr->bhm",q.to(X.dtype),X[...,:R])
        return torch.einsum("bhm,bhmd->bhd",torch.einsum("bhn,hnm->bhm",a,G),X[...,R:]).real
    for nm,f in [("literal",literal),("associative",associative)]:
        def graphed(steps=20):
            s=torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(s):
                for _ in range(3): f()
            torch.cuda.current_stream().wait_stream(s); g=torch.cuda.CUDAGraph()
            with torch.cuda.graph(g):
                for _ in range(steps): f()
            return t(g.replay,20,5)/steps
        guard("interdomain_decode", graphed, impl=nm,B=B,H=H,M=M,R=R,d=d, state_mb=round(X.numel()*8/1e6,1))
# ---- 5. S4D layer: kernel generation + FFT convolution
# N is the real state size, twice the number of complex modes.
cases=[(8,512,4096,64),(8,512,16384,64),(1,1024,65536,64)] if wanted("s4d") else []
if wanted("s4d_sweep"): cases+=[(8,512,L,64) for L in (256,1024)]+[(8,512,16384,N) for N in (8,16,32,128)]
for (B,D,L,N) in cases:
    n=torch.arange(N//2,device=dev); A=torch.complex(torch.full((D,N//2),-.5,device=dev),math.pi*n.repeat(D,1).float()).requires_grad_()
    C=torch.randn(D,N//2,device=dev,dtype=torch.complex64,requires_grad=True); ldt=(torch.rand(D,device=dev)*(math.log(.1)-math.log(.001))+math.log(.001)).requires_grad_()
    u=torch.randn(B,D,L,device=dev,requires_grad=True); Dk=torch.randn(D,device=dev,requires_grad=True)
    def s4d(u,A,C,ldt,Dk):
        dt=ldt.exp(); dA=A*dt[:,None]; Cc=C*(dA.exp()-1)/A
        K=2*torch.einsum("dn,dnl->dl",Cc,torch.exp(dA[:,:,None]*torch.arange(L,device=dev))).real
        return torch.fft.irfft(torch.fft.rfft(K,n=2*L)*torch.fft.rfft(u,n=2*L),n=2*L)[...,:L]+u*Dk[:,None]
    def fw():
        with torch.no_grad(): s4d(u,A,C,ldt,Dk)
    guard("s4d_fwd", lambda: t(fw,10,3), B=B,D=D,L=L,N=N); guard("s4d_fwdbwd", lambda: t(fb(s4d,u,A,C,ldt,Dk),10,3), B=B,D=D,L=L,N=N)
    del u,A,C
