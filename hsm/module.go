package hsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sync/semaphore"
)

// module is one loaded PKCS#11 library. C_Finalize during another call crashes
// SoftHSM, so every call holds the gate for reading and C_Initialize and
// C_Finalize hold it alone. The gate is a semaphore and not a sync.RWMutex
// because a hung call would otherwise block whoever waits for it, without end.
type module struct {
	path string
	conf string // SOFTHSM2_CONF at C_Initialize; "" leaves the variable alone
	p11  *pkcs11.Ctx
	fn   functions

	gate      *semaphore.Weighted
	abandoned atomic.Int64 // calls past their deadline that are still inside

	mu   sync.Mutex
	refs int // open devices

	// Written under the whole gate, read under a share of it.
	ready   bool
	foreign bool   // somebody else initialised the library: never finalise it
	gen     uint64 // counts initialisations; handles of an older one are void
}

const wholeGate = 1 << 30

var loaded = struct {
	sync.Mutex
	modules map[string]*module
}{modules: map[string]*module{}}

// environment serialises changes of SOFTHSM2_CONF.
var environment sync.Mutex

// loadModule returns the module for a library, loading it when it is new to
// the process. A library stays loaded: unloading it under threads that it may
// have started is not safe.
func loadModule(path, conf string) (*module, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w: install the PKCS#11 library of the device (SoftHSM on Debian: package softhsm2)", ErrModule, path, err)
	}
	loaded.Lock()
	defer loaded.Unlock()
	if m := loaded.modules[real]; m != nil {
		if m.conf != conf {
			return nil, invalidf("library %s is in use with another SoftHSM configuration: a library reads its configuration once per process: a node can take isolate = true, everything else a copy of the library", path)
		}
		return m, nil
	}
	p11 := pkcs11.New(real)
	if p11 == nil {
		return nil, fmt.Errorf("%w: %s cannot be loaded: it is not a PKCS#11 library for this machine, or a library it needs is missing (ldd names it)", ErrModule, path)
	}
	fn, ok := functionsOf(real)
	if !ok {
		return nil, fmt.Errorf("%w: %s names no functions: C_GetFunctionList fails", ErrModule, path)
	}
	m := &module{path: real, conf: conf, p11: p11, fn: fn, gate: semaphore.NewWeighted(wholeGate)}
	loaded.modules[real] = m
	return m, nil
}

// retain counts a device in; release counts it out.
func (m *module) retain() {
	m.mu.Lock()
	m.refs++
	m.mu.Unlock()
}

// release finalises the library when its last device has gone. A library that
// cannot be had alone before ctx ends stays initialised.
func (m *module) release(ctx context.Context) {
	err := m.gate.Acquire(ctx, wholeGate)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refs--
	if err != nil {
		return
	}
	defer m.gate.Release(wholeGate)
	if m.refs == 0 && m.ready && !m.foreign {
		_ = m.p11.Finalize() // nothing is open any more; at worst the next Initialize reports it
		m.ready = false
	}
}

// enter takes a share of the gate with the library initialised.
func (m *module) enter(within time.Duration) error {
	if m.gate.TryAcquire(1) {
		if m.ready {
			return nil
		}
		m.gate.Release(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		if err := m.gate.Acquire(ctx, 1); err != nil {
			return unavailablef("the library is being initialised")
		}
		if m.ready {
			return nil
		}
		m.gate.Release(1)
		if err := m.alone(ctx, func() error {
			if m.ready {
				return nil
			}
			return m.initialize()
		}); err != nil {
			return err
		}
	}
}

func (m *module) leave() { m.gate.Release(1) }

// reinitialize finalises and initialises the library, unless that has happened
// since the caller saw generation gen. Handles of all its devices become void.
func (m *module) reinitialize(ctx context.Context, gen uint64) error {
	return m.alone(ctx, func() error {
		if m.gen != gen {
			return nil
		}
		if !m.foreign {
			if err := m.p11.Finalize(); err != nil && !isRV(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) {
				return classify("C_Finalize", err)
			}
		}
		m.ready = false
		return m.initialize()
	})
}

// alone runs f with the whole gate. It gives up at once while an abandoned
// call is inside, since that one may never leave.
func (m *module) alone(ctx context.Context, f func() error) error {
	if m.abandoned.Load() > 0 {
		return unavailablef("the library cannot be initialised again while a call hangs in it; restart the process if the device stays away")
	}
	if err := m.gate.Acquire(ctx, wholeGate); err != nil {
		return unavailablef("calls are still inside the library")
	}
	defer m.gate.Release(wholeGate)
	return f()
}

func (m *module) initialize() error {
	restore, err := m.setConf()
	if err != nil {
		return err
	}
	defer restore()
	err = m.p11.Initialize()
	m.foreign = isRV(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)
	if err != nil && !m.foreign {
		return fmt.Errorf("%w: %s: C_Initialize: %w (SoftHSM: is the file in SOFTHSM2_CONF there, and its token directory readable?)", ErrModule, m.path, err)
	}
	m.ready = true
	m.gen++
	// SoftHSM adds a slot for the next new token when it is first asked how
	// many slots there are, without a lock: let that happen here, alone.
	if _, err := m.p11.GetSlotList(true); err != nil {
		return classify("C_GetSlotList", err)
	}
	return nil
}

// setConf puts the SoftHSM configuration into the environment, where alone the
// library looks for it, and returns the way back.
func (m *module) setConf() (restore func(), err error) {
	const name = "SOFTHSM2_CONF"
	if m.conf == "" {
		return func() {}, nil
	}
	environment.Lock()
	old, had := os.LookupEnv(name)
	if had && old == m.conf {
		return environment.Unlock, nil
	}
	if err := os.Setenv(name, m.conf); err != nil {
		environment.Unlock()
		return nil, errors.Join(ErrModule, err)
	}
	return func() {
		if had {
			_ = os.Setenv(name, old)
		} else {
			_ = os.Unsetenv(name)
		}
		environment.Unlock()
	}, nil
}

// forget takes a module whose file is going away out of the table, so that a
// later file of the same name is not taken for it.
func forget(m *module) {
	loaded.Lock()
	defer loaded.Unlock()
	if loaded.modules[m.path] == m {
		delete(loaded.modules, m.path)
	}
}
