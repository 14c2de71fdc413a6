package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

var (
	backupKeys = flag.Int("keys", 1000, "keys in the backup that is measured")
	backupStep = flag.String("step", "", "internal: what a process of its own does with the files in -files")
	backupDir  = flag.String("files", "", "internal")
)

// BenchmarkBackup measures a backup of a cluster of three sites with P-384 devices and
// -keys keys: writing it, verifying every statement in it, taking it on the word of the
// node that signed it, and restoring it with an approved statement into a data
// directory. Each step is a process of its own, so that its peak memory is its own.
//
//	go test ./test/bench -run '^$' -bench Backup -benchtime 1x -keys 100000
func BenchmarkBackup(b *testing.B) {
	if *backupStep != "" {
		step(b, *backupStep)
		return
	}
	for b.Loop() {
		dir := *backupDir
		if dir == "" {
			dir = b.TempDir()
		}
		prepareBackup(b, dir)
		stat, err := os.Stat(filepath.Join(dir, "backup"))
		if err != nil {
			b.Fatal(err)
		}
		fmt.Printf("backup of %d keys: %.1f MiB\n", *backupKeys, float64(stat.Size())/(1<<20))
		for _, s := range []string{"create", "verify", "verify-signer", "restore"} {
			cmd := exec.Command(os.Args[0], "-test.run", "^$", "-test.bench", "Backup", "-test.benchtime", "1x", "-step", s, "-files", dir)
			out, err := cmd.CombinedOutput()
			if err != nil {
				b.Fatalf("%s: %v\n%s", s, err, out)
			}
			for line := range strings.Lines(string(out)) {
				if strings.HasPrefix(line, "step ") {
					fmt.Print(line)
				}
			}
		}
	}
}

// prepared is what the steps need beside the files.
type prepared struct {
	Cluster, Signer string
}

// prepareBackup makes a cluster with keys, its backup and an approved statement for it.
func prepareBackup(b *testing.B, dir string) {
	w := statetest.New(b, statetest.Options{P384: true})
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.GiveReceipts()
	for i := range *backupKeys {
		w.CreateKey("coalition", fmt.Sprintf("key-%06d", i), kms.Encrypt)
		if i%1000 == 999 {
			w.Advance(11 * time.Minute) // nonces are remembered for ten
		}
	}
	w.Advance(11 * time.Minute)
	s := w.State()
	f, err := os.Create(filepath.Join(dir, "backup"))
	if err != nil {
		b.Fatal(err)
	}
	out := bufio.NewWriterSize(f, 1<<20)
	if _, err := backup.Write(b.Context(), out, s, "node-fr-1", "bench", time.Now(), w.Node("node-fr-1").Sign); err != nil {
		b.Fatal(err)
	}
	if err := out.Flush(); err != nil {
		b.Fatal(err)
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	n, _ := s.Node("node-fr-1")
	note, err := json.Marshal(prepared{s.Cluster(), pqc.Fingerprint(n.Signing)})
	if err != nil {
		b.Fatal(err)
	}
	key, err := w.Node("node-fr-1").Key.Bytes()
	if err != nil {
		b.Fatal(err)
	}
	approved := w.ApproveRecovery(w.RecoverStatement(s), "fr-1", "de-1")
	for name, content := range map[string][]byte{"note": note, "approved": approved, "key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			b.Fatal(err)
		}
	}
}

// step does one step and prints its time and memory.
func step(b *testing.B, name string) {
	read := func(name string) []byte {
		content, err := os.ReadFile(filepath.Join(*backupDir, name))
		if err != nil {
			b.Fatal(err)
		}
		return content
	}
	var note prepared
	if err := json.Unmarshal(read("note"), &note); err != nil {
		b.Fatal(err)
	}
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P384(), read("key"))
	if err != nil {
		b.Fatal(err)
	}
	device := &statetest.Node{Key: key}
	for b.Loop() {
		o := backup.Options{Cluster: note.Cluster}
		var held *state.State
		var before int64
		if name == "verify-signer" || name == "create" {
			o.Signer = note.Signer
		}
		if name == "create" { // the node holds the state: what counts is what comes on top
			held = verified(b, o)
			runtime.GC()
			before = memory(b, "VmRSS:")
			if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // forgets the peak, proc(5)
				b.Fatal(err)
			}
		}
		start, cpu := time.Now(), processTime(b)
		switch name {
		case "create":
			f, err := os.Create(filepath.Join(*backupDir, "again"))
			if err != nil {
				b.Fatal(err)
			}
			if _, err := backup.Write(b.Context(), f, held, "node-fr-1", "bench", time.Now(), device.Sign); err != nil {
				b.Fatal(err)
			}
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
		case "restore":
			st, err := verified(b, o).Recover(read("approved"))
			if err != nil {
				b.Fatal(err)
			}
			n, _ := st.Node("node-fr-1")
			dir := cluster.Offline{NodeID: n.ID, DataDir: filepath.Join(*backupDir, "raft"), Genesis: st.SignedGenesis(),
				Sign: device.Sign, SigningSuite: n.SigningSuite, Signing: n.Signing}
			if _, err := dir.Begin(b.Context(), st); err != nil {
				b.Fatal(err)
			}
		default:
			held = verified(b, o)
		}
		took, cpu := time.Since(start), processTime(b)-cpu
		peak := memory(b, "VmHWM:")
		text := fmt.Sprintf("peak memory %d MiB", peak>>20)
		if name == "create" {
			text = fmt.Sprintf("%d MiB more than the %d MiB of the process with the state", max(0, peak-before)>>20, before>>20)
		}
		fmt.Printf("step %-14s %7.2f s, %.2f s of CPU, %s\n", name, took.Seconds(), cpu.Seconds(), text)
		runtime.KeepAlive(held)
	}
}

func verified(b *testing.B, o backup.Options) *state.State {
	f, err := os.Open(filepath.Join(*backupDir, "backup"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	r, err := backup.Verify(bufio.NewReaderSize(f, 1<<20), o)
	if err != nil {
		b.Fatal(err)
	}
	return r.State
}

// processTime is the CPU time that this process has used.
func processTime(b *testing.B) time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// memory reads a size of this process in bytes, by its name in proc(5).
func memory(b *testing.B, name string) int64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(line, []byte(name)); ok {
			var kib int64
			if _, err := fmt.Sscan(string(rest), &kib); err != nil {
				b.Fatal(err)
			}
			return kib << 10
		}
	}
	b.Fatalf("/proc/self/status has no %s", name)
	return 0
}
