package child

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
)

// server is the child's side.
type server struct {
	device *hsm.Device
	w      *writer
	busy   atomic.Int32 // workers with a request

	readMu sync.Mutex
	r      *reader
	ended  error // under readMu: nothing more comes

	keysMu sync.RWMutex
	keys   map[uint64]key
}

// key is a loaded key by its closures.
type key struct {
	use    use
	unload func()
}

// serve opens the device that the first frame on conn names, answers requests and
// ends, with the device closed, when the other side hangs up.
func serve(conn *os.File) error {
	s := &server{keys: map[uint64]key{}}
	var err error
	if s.w, err = newWriter(func(b []byte) ([]byte, error) { _, err := conn.Write(b); return nil, err }, nil,
		func() bool { return s.busy.Load() > 1 }); err != nil {
		return err
	}
	if s.r, err = newReader(conn); err != nil {
		return err
	}
	sessions, err := s.open()
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for range underWay * sessions {
		wg.Go(s.work)
	}
	wg.Wait()
	s.r.end()
	if err := s.device.Close(); err != nil {
		return err
	}
	if errors.Is(s.ended, io.EOF) {
		return nil
	}
	return s.ended
}

// open answers the first request.
func (s *server) open() (sessions int, err error) {
	frame, err := s.r.next()
	if err != nil {
		return 0, err
	}
	m, err := parse(frame)
	if err != nil {
		return 0, err
	}
	cfg, err := parseOpening(m)
	if err == nil {
		s.device, err = hsm.Open(context.Background(), cfg)
		cfg.PIN.Destroy()
	}
	reply := message{}
	if err == nil {
		reply, err = identityReply(s.device)
	}
	if err != nil {
		reply = errorReply(err)
	}
	reply.id = m.id
	if e := s.w.send(context.Background(), &reply); e != nil {
		return 0, e
	}
	return cfg.MaxSessions, err
}

func parseOpening(m message) (hsm.Config, error) {
	if m.op != opOpen || m.n != 5 || m.key != protocol {
		return hsm.Config{}, invalidf("the first frame is not that of this version: parent and child are different programs, restart the node")
	}
	l, err := parseLimits(m.parts[4])
	if err != nil {
		return hsm.Config{}, err
	}
	pin, err := secret.Copy(m.parts[1])
	if err != nil {
		return hsm.Config{}, unavailablef("%v", err)
	}
	return hsm.Config{URI: string(m.parts[0]), PIN: pin, Label: string(m.parts[2]), SoftHSMConf: string(m.parts[3]), Curve: curveOf(m.arg),
		CallTimeout: l.timeout, MaxSessions: l.sessions, MaxLoaded: l.loaded}, nil
}

// work takes one request after the other. One worker waits for the next frame, the
// others are in the library or wait for their turn.
func (s *server) work() {
	buf, err := secret.New(slotBuffer)
	if err != nil {
		return
	}
	defer buf.Destroy()
	for {
		s.readMu.Lock()
		frame, large, err := s.take(buf)
		s.readMu.Unlock()
		if err != nil {
			return
		}
		s.busy.Add(1)
		m, err := parse(frame)
		reply := message{}
		if err == nil {
			reply, err = s.handle(&m)
		}
		if err != nil {
			reply = errorReply(err)
		}
		reply.op, reply.id = opReply, frameID(frame)
		secret.Wipe(frame)
		large.Destroy()
		err = s.w.send(context.Background(), &reply)
		for _, p := range reply.parts[:reply.n] {
			secret.Wipe(p)
		}
		reply.held.Destroy()
		s.busy.Add(-1)
		if err != nil {
			return // the parent has gone
		}
	}
}

// take copies the next frame into buf, or into memory of its own. It runs under readMu.
func (s *server) take(buf *secret.Bytes) (frame []byte, large *secret.Bytes, err error) {
	if s.ended != nil {
		return nil, nil, s.ended
	}
	b, err := s.r.next()
	if err != nil {
		s.ended = err
		return nil, nil, err
	}
	if len(b) > buf.Len() {
		if large, err = secret.New(len(b)); err != nil {
			s.ended = err
			return nil, nil, err
		}
		buf = large
	}
	room := buf.Reveal()
	return room[:copy(room, b)], large, nil
}

// handle makes the call that a request asks for.
func (s *server) handle(m *message) (message, error) {
	ctx := context.Background()
	if m.n != requestParts[m.op] {
		return message{}, invalidf("malformed request")
	}
	p := &m.parts
	switch m.op {
	case opECDH:
		peer, err := s.device.AgreementKey().Curve().NewPublicKey(p[0])
		if err != nil {
			return message{}, invalidf("ECDH: the peer's key is not on the device's curve")
		}
		return single(s.device.ECDH(ctx, peer))
	case opSign:
		return single(s.device.Sign(ctx, p[0]))
	case opWrap:
		return single(s.device.Wrap(ctx, p[0], p[1]))
	case opUnwrap:
		return s.unwrap(ctx, p[0], p[1])
	case opRandom:
		if m.key > randomChunk {
			return message{}, invalidf("malformed request")
		}
		b := make([]byte, m.key)
		return single(b, s.device.Random(ctx, b))
	case opCheck:
		return message{}, s.device.Check(ctx)
	case opAttributes:
		all, err := s.device.Attributes(ctx)
		if err != nil {
			return message{}, err
		}
		return single(encodeAttributes(all))
	case opRewrap:
		return single(s.device.Rewrap(ctx, p[0], p[1]))
	}
	return s.handleKey(ctx, m)
}

// requestParts is how many parts each request has.
var requestParts = [opEnd]int{opECDH: 1, opSign: 1, opWrap: 2, opUnwrap: 2, opLoadHMAC: 1, opLoadSigner: 1, opUse: 1,
	opGenerateHMAC: 1, opGenerateSigner: 1, opRewrap: 2}

// handleKey makes calls with and about loaded keys.
func (s *server) handleKey(ctx context.Context, m *message) (message, error) {
	switch m.op {
	case opLoadHMAC:
		f, unload, err := s.device.LoadHMAC(ctx, m.parts[0])
		return message{}, s.keep(m.key, key{f, unload}, err)
	case opLoadSigner:
		f, unload, err := s.device.LoadSigner(ctx, curveOf(m.arg), m.parts[0])
		return message{}, s.keep(m.key, key{f, unload}, err)
	case opUse:
		s.keysMu.RLock()
		k, ok := s.keys[m.key]
		s.keysMu.RUnlock()
		if !ok {
			return message{}, invalidf("the key was unloaded: load it again")
		}
		return single(k.use(ctx, m.parts[0]))
	case opUnload:
		s.keysMu.Lock()
		k, ok := s.keys[m.key]
		delete(s.keys, m.key)
		s.keysMu.Unlock()
		if ok {
			k.unload()
		}
		return message{}, nil
	case opGenerateHMAC, opGenerateSigner:
		return s.generate(ctx, m)
	}
	return message{}, invalidf("malformed request")
}

// keep files a loaded key under its number.
func (s *server) keep(number uint64, k key, err error) error {
	if err != nil {
		return err
	}
	s.keysMu.Lock()
	old, ok := s.keys[number]
	s.keys[number] = k
	s.keysMu.Unlock()
	if ok { // the parent gave up waiting for a load and has repeated it
		old.unload()
	}
	return nil
}

func (s *server) generate(ctx context.Context, m *message) (message, error) {
	recipients, err := splitList(m.parts[0])
	if err != nil {
		return message{}, err
	}
	var (
		blobs  [][]byte
		public []byte
		k      key
	)
	if m.op == opGenerateHMAC {
		blobs, k.use, k.unload, err = s.device.GenerateHMAC(ctx, recipients)
	} else {
		var pub *ecdsa.PublicKey
		if blobs, pub, k.use, k.unload, err = s.device.GenerateSigner(ctx, curveOf(m.arg), recipients); err == nil {
			public, err = pub.Bytes()
		}
	}
	if err := s.keep(m.key, k, err); err != nil {
		return message{}, err
	}
	return request(opReply, 0, joinList(blobs), public), nil
}

func (s *server) unwrap(ctx context.Context, aad, wrapped []byte) (message, error) {
	plain, err := s.device.Unwrap(ctx, aad, wrapped)
	if err != nil {
		return message{}, err
	}
	reply := request(opReply, 0, plain.Reveal())
	reply.held = plain
	return reply, nil
}

// single is a reply of one part.
func single(b []byte, err error) (message, error) {
	if err != nil {
		return message{}, err
	}
	return request(opReply, 0, b), nil
}
