package hsm

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// block makes the given operations hang until the returned function is called.
func (d *Device) block(ops ...string) (release func()) {
	gate := make(chan struct{})
	hook := func(op string) error {
		for _, o := range ops {
			if o == op {
				<-gate
			}
		}
		return nil
	}
	d.hook.Store(&hook)
	return sync.OnceFunc(func() { close(gate) })
}

func TestHungCallIsAbandoned(t *testing.T) {
	_, d := openNew(t)
	d.set.timeout, d.probeEvery = time.Second, time.Hour
	release := d.block("sign")
	defer release()
	ctx := context.Background()
	if _, err := d.Sign(ctx, make([]byte, 48)); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("hung Sign: %v", err)
	}
	if _, err := d.Wrap(ctx, nil, []byte("k")); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("a call to an unhealthy device: %v", err)
	}
	if err := d.mod.reinitialize(ctx, d.mod.gen); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("the library was initialised again under a hung call: %v", err)
	}
	if err := d.Check(ctx); err != nil { // the probe succeeds
		t.Fatal(err)
	}
	if _, err := d.Wrap(ctx, nil, []byte("k")); err != nil {
		t.Fatal(err)
	}
	release()
	useAll(t, d)
}

func TestAbandonedCallsAreBounded(t *testing.T) {
	_, d := openNew(t)
	d.set.timeout, d.set.maxSessions, d.probeEvery = 100*time.Millisecond, 3, 0
	release := d.block("check")
	defer release()
	for range 10 {
		if err := d.Check(context.Background()); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
	}
	d.mu.Lock()
	hung := d.abandoned
	d.mu.Unlock()
	if hung != 3 {
		t.Fatalf("%d calls hang, want the bound of 3", hung)
	}
	if err := d.Close(); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("Close under hung calls: %v", err)
	}
	release()
	var err error
	for range 100 { // each waits as long as a call may take
		if err = d.Close(); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatalf("Close after the calls came back: %v", err)
	}
}

// TestCancelLeavesDeviceHealthy: a caller that goes away early says nothing
// about the device.
func TestCancelLeavesDeviceHealthy(t *testing.T) {
	_, d := openNew(t)
	entered := make(chan struct{})
	gate := make(chan struct{})
	hook := func(op string) error {
		if op == "sign" {
			close(entered)
			<-gate
		}
		return nil
	}
	d.hook.Store(&hook)
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() {
		_, err := d.Sign(ctx, make([]byte, 48))
		result <- err
	}()
	<-entered
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	d.hook.Store(nil)
	useAll(t, d)
	close(gate)
}

// TestDeadlineOfCaller: a caller's deadline is ErrUnavailable.
func TestDeadlineOfCaller(t *testing.T) {
	_, d := openNew(t)
	release := d.block("sign")
	defer release()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := d.Sign(ctx, make([]byte, 48)); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

// TestDesertedResultIsWiped: nobody gets the result of an abandoned call.
func TestDesertedResultIsWiped(t *testing.T) {
	_, d := openNew(t)
	ctx, cancel := context.WithCancel(context.Background())
	out := []byte("a shared secret")
	wiped := make(chan struct{})
	gate := make(chan struct{})
	_, err := call(ctx, d, callOptions{op: "test", release: func() { close(wiped) }}, func(*session) ([]byte, error) {
		cancel()
		<-gate
		return out, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(gate)
	<-wiped
	if err := d.Close(); err != nil { // waits for the worker
		t.Fatal(err)
	}
	if !bytes.Equal(out, make([]byte, len(out))) {
		t.Fatal("the result stays in memory")
	}
}

// TestErrorClosesSession: an operation may be active in a session after an error.
func TestErrorClosesSession(t *testing.T) {
	_, d := openNew(t)
	useAll(t, d)
	var used *session
	_, err := call(context.Background(), d, callOptions{op: "test"}, func(s *session) (int, error) {
		used = s
		return 0, errors.New("half way")
	})
	if !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	again, err := call(context.Background(), d, callOptions{op: "test"}, func(s *session) (*session, error) { return s, nil })
	if err != nil {
		t.Fatal(err)
	}
	if again == used {
		t.Fatal("the session was used again")
	}
	useAll(t, d)
}
